"""torch.onnx.export of accelerated models and of layers: torch's operators alone."""

import copy
import io

import pytest
import torch
from peft_helpers import make_ids, net
from step_helpers import make
from torch import nn

import lora_ext

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")


def exported(model: nn.Module, inputs: tuple, tmp_path, dynamo: bool) -> bytes:
    if dynamo:
        pytest.importorskip("onnxscript")
        path = tmp_path / "model.onnx"
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
        return path.read_bytes()
    file = io.BytesIO()
    torch.onnx.export(model, inputs, file, dynamo=False)
    return file.getvalue()


def assert_right(data: bytes, inputs: tuple, wanted: torch.Tensor) -> None:
    assert b"lora_ext::" not in data
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(data)
    names = [one.name for one in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    torch.testing.assert_close(
        torch.tensor(session.run(None, feed)[0]), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("adapters", ["one", "dora"])
def test_an_accelerated_model_is_exported_as_pefts(adapters, dynamo, tmp_path):
    model = lora_ext.accelerate(net(adapters)).eval()
    inputs = (make_ids(),)
    with torch.no_grad():
        data = exported(model, inputs, tmp_path, dynamo)
        assert_right(data, inputs, model(*inputs))


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", ["linear", "several", "convolution"])
def test_a_layer_is_exported(name, dynamo, tmp_path):
    layer, x = make(name, 0.4)
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        data = exported(layer, (x,), tmp_path, dynamo)
        assert_right(data, (x,), layer(x))

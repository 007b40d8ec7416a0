"""`lora_ext.accelerate` beside PEFT's own forward on the same model: memory, masks, DoRA, paths.

`contract/test_numerics` has the numbers that our own layers are held to, too.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F16, F32, F64, HALVES, Ops, keep_scale_of, max_error, rms_error, short
from peft import LoraConfig, get_peft_model
from peft_helpers import (
    ADAPTERS,
    HEIGHT,
    KINDS,
    WIDTH,
    accelerated,
    layer_model,
    lora_modules,
    make_x,
    paths,
    peft_model,
    reasons,
    step,
)
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

import lora_ext
from benchmarks.memory import peak_bytes
from lora_ext.call import Call
from lora_ext.dropout import draw_seed
from lora_ext.peft.linear import OverLinear, fast_path_operands

CASES = [
    (kind, adapters)
    for kind in KINDS
    for adapters in ADAPTERS
    if (kind, adapters) != ("embedding", "lora_bias")  # PEFT has none
]
MODES = [(F32, False), (BF16, False), (BF16, True), (F16, False), (F16, True)]


def mode_id(mode):
    return f"{short(mode[0])}{' half adapters' if mode[1] else ''}"


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_same_bits_with_a_wide_lora_bias(dtype):
    """The op would round a float32 bias: the base is called, the update added in float32."""
    model = layer_model("linear", "lora_bias", dtype)
    fast, x = accelerated(model), make_x("linear", dtype)
    assert reasons(fast) == {("added", "a lora_bias beside a 16-bit base weight")}
    assert torch.equal(step(fast, x)["y"], step(model, x)["y"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
@pytest.mark.parametrize("adapters", ["one", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_against_float64_with_the_same_mask(kind, adapters, dtype):
    """y and dx with p = 0.3; the formulas are PEFT's, the mask is `dropout_mask`'s."""
    model = accelerated(layer_model(kind, adapters, dtype, lora_dropout=0.3))
    layer, x = model.base_model.model[0], make_x(kind, dtype, 200)
    assert set(paths(model).values()) == {"added" if adapters == "dora" else "fused"}
    found = step(model, x)
    torch.manual_seed(7)
    mask = lora_ext.functional.dropout_mask(draw_seed(x.device), *x.shape, 0.3)
    wide = x.double().requires_grad_()
    y = dropped_reference(layer, wide, mask * keep_scale_of(0.3))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    y.backward(grad.to(dtype).double())
    limit = 2e-2 if dtype == BF16 else 2e-6
    for name, wanted in (("y", y.detach()), ("dx", wide.grad)):
        assert max_error(found[name], wanted) <= limit * wanted.abs().max().item(), name
        assert rms_error(found[name], wanted) <= 0.3 * limit * wanted.abs().max().item(), name


def dropped_reference(layer, x, factor):
    """The layer of `lora_ext.peft` in float64 on a dropped x, by the formulas of LoRA and DoRA."""
    base = layer.base_layer
    weight = base.weight.double() if isinstance(base, torch.nn.Linear) else base.weight.double().t()
    bias = base.bias.double()
    a, b = layer.lora_A["a"].weight.double(), layer.lora_B["a"].weight.double()
    s, dropped = layer.scaling["a"], x * factor
    update = s * dropped @ a.t() @ b.t()
    if not layer.lora_magnitude_vector:
        return F.linear(x, weight, bias) + update
    g = layer.lora_magnitude_vector["a"].weight.double() / (weight + s * b @ a).norm(dim=1)
    return F.linear(x, weight, bias) + (g - 1) * (dropped @ weight.t()) + g * update


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES[:3], ids=mode_id)
@pytest.mark.parametrize(("kind", "adapters"), CASES)
def test_saves_no_more_than_peft(kind, adapters, mode, dropout):
    """Bytes of distinct tensors that autograd keeps, x and the parameters aside.

    S is float32 where PEFT's is half, as are A and B where the base is called as it is, and several
    adapters are one pair of factors made anew: nothing of x's size.
    """
    model = layer_model(kind, adapters, *mode, lora_dropout=dropout)
    x = make_x(kind, mode[0], rows=300)
    rank = sum(words["r"] for words in ADAPTERS[adapters].values())
    slack = 2 * rank * len(x) if mode[1] else 0
    if mode[1] or len(ADAPTERS[adapters]) > 1:
        slack += 4 * rank * (WIDTH + HEIGHT)
    assert saved_bytes(accelerated(model), x) <= saved_bytes(model, x) + slack


def saved_bytes(model, x):
    kept = {}
    given = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    given.add(x.untyped_storage().data_ptr())

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address repeats
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for pointer, (size, _) in kept.items() if pointer not in given)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapters", ["one", "dora", "lora_bias"])
@pytest.mark.parametrize("half_adapters", [False, True])
def test_peak_memory_no_larger_than_pefts(half_adapters, adapters, dropout):
    words = dict(ADAPTERS[adapters]["a"], lora_dropout=dropout)
    peaks = []
    for change in (lambda model: model, accelerated):
        model = change(wide_model(words, half_adapters))
        x = torch.randn(2048, 512, dtype=BF16, requires_grad=True)
        grad = torch.randn(2048, 768).to(BF16)

        def run(model=model, x=x, grad=grad):
            model(x).backward(grad)

        run()
        peaks.append(peak_bytes(run))
    assert peaks[1] <= peaks[0]


def wide_model(words, half_adapters):
    base = torch.nn.Sequential(torch.nn.Linear(512, 768))
    return peft_model(base, {"a": words}, ["0"], BF16, half_adapters)


def test_dora_makes_nothing_of_the_weights_size():
    """Its norm comes in blocks of rows; PEFT holds four tensors of the weight's size and more."""

    base = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False))
    model = accelerated(peft_model(base, ADAPTERS["dora"], ["0"], BF16))
    x = torch.randn(8, 4096, dtype=BF16)
    with torch.no_grad():
        model(x)
        peak = peak_bytes(lambda: model(x))
    delta = 4 * 4096 * 4096
    # Two blocks of 16 MiB, of 64 MiB that a float32 delta has.
    assert peak < 0.6 * delta


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("width", [64, 2100])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "embedding"])
def test_dora_is_the_base_at_initialisation(kind, width, mode):
    """The magnitude is PEFT's norm: with the same rounding here the factor is 1.

    Weights stored as [in, out] are summed in another order than PEFT's, and PEFT sums float16 in
    float16: the factor may be 1 up to its last bits. PEFT's default keeps a norm that was rounded
    to half, and its own y differs from the base.
    """
    dtype, half_adapters = mode
    bases = {
        "linear": lambda: torch.nn.Linear(width, 600),
        "linear without bias": lambda: torch.nn.Linear(width, 600, bias=False),
        "conv1d": lambda: Conv1D(600, width),
        "embedding": lambda: torch.nn.Embedding(600, width),
    }
    base = bases[kind]().to(dtype)
    model = torch.nn.Sequential(copy.deepcopy(base))
    config = LoraConfig(target_modules=["0"], r=4, use_dora=True)
    model = get_peft_model(model, config, autocast_adapter_dtype=not half_adapters)
    x = torch.randint(600, (5,)) if kind == "embedding" else torch.randn(5, width).to(dtype)
    with torch.no_grad():
        wanted, theirs = base(x), model(x)
        y = lora_ext.accelerate(model)(x)
    assert set(paths(model).values()) == {"added"}
    if kind.startswith("linear") and (dtype == F32 or mode == (BF16, True)):
        assert torch.equal(y, wanted)
    error, limit = max_error(y, wanted.double()), max_error(theirs, wanted.double())
    assert error <= 2 * limit + 16 * torch.finfo(dtype).eps * wanted.abs().max().item()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_dora_against_finite_differences(kind, dropout):
    """The norm is a constant, so that lora_A's and lora_B's own gradients are not the whole
    derivative: x and the magnitude are checked, the rest beside PEFT in `test_same_in_float64`."""
    model = lora_ext.accelerate(layer_model(kind, "dora", F64, lora_dropout=dropout))
    (layer,) = lora_modules(model).values()
    x = make_x(kind, F64, 3)
    magnitude = layer.lora_magnitude_vector["a"].weight

    def run(*_):
        torch.manual_seed(4)
        return model(x)

    inputs = (magnitude,) if kind == "embedding" else (x.requires_grad_(), magnitude)
    assert torch.autograd.gradcheck(run, inputs)


CHANGES = {
    "nothing": lambda layer: None,
    "scaling": lambda layer: layer.set_scale("a", 3.0),
    "training": lambda layer: layer.train(),
    "disable": lambda layer: layer.enable_adapters(False),
    "merge": lambda layer: layer.merge(),
    "train base": lambda layer: layer.base_layer.weight.requires_grad_(),
    "hook on A": lambda layer: layer.lora_A["a"].register_forward_hook(lambda *_: None),
    "hook on base": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "several": lambda layer: layer.set_adapter(["a", "b"]),
    "no such adapter": lambda layer: setattr(layer, "_active_adapter", "zzz"),
    "tensor scaling": lambda layer: layer.scaling.update(a=torch.tensor(2.0)),
    "x in another dtype": lambda layer: None,
    "autocast": lambda layer: None,
}


def _as_value(each):
    if not isinstance(each, torch.Tensor) or each.numel() == 1:  # a seed
        return each
    return each.data_ptr(), each.shape, each.stride()


@pytest.mark.parametrize("change", CHANGES)
def test_the_fast_path_has_the_operands_of_the_full_one(change):
    """Where `fast_path_operands` answers, the decision is fused and calls the op with the same."""
    model = accelerated(layer_model("linear", "three", lora_dropout=0.25)).eval()
    model.set_adapter("a")
    layer = model.base_model.model[0]
    CHANGES[change](layer)
    x = make_x("linear", F64 if change == "x in another dtype" else F32)
    with torch.autocast("cpu", enabled=change == "autocast"):
        operands, decision = fast_path_operands(layer, x), layer.decide(Call(x))
    assert (operands is not None) == (change in ("nothing", "scaling", "training"))
    if operands is not None:
        assert decision.path == "fused"
        seen = []
        for run in (decision.run, lambda x: lora_ext.lora_linear(x, *operands)):
            torch.manual_seed(3)
            with torch.no_grad(), Ops() as ops:
                run(x)
            own = [each for each in ops.seen if each[0].namespace == "lora_ext"]
            seen.append([(func, str(tree_map(_as_value, given))) for func, given in own])
        assert seen[0] == seen[1] and seen[0]


def test_the_fast_path_is_back_after_a_block(monkeypatch):
    """A layer keeps a mark of a block in which gradients were recorded."""
    model, x = accelerated(layer_model("linear")), make_x("linear")
    with lora_ext.use_adapters(model, ["a"] * len(x)):
        model(x)
    assert model.base_model.model[0].row_adapters is not None
    monkeypatch.setattr(OverLinear, "decide", None)
    model(x)

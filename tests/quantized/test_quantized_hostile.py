"""What should not be done to quantised weights, and is."""

import copy

import pytest
import torch
from helpers import BF16, F32, make_problem
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_helpers import paths, randomize, step
from quantized_helpers import Rows, quantized_rows
from quantized_models import KINDS, WIDTH, bnb_four_bits, make_x, quantized_net
from torch import nn

import lora_ext
from lora_ext.quantized import workspace
from lora_ext.quantized.layers import quantized_base

pytestmark = pytest.mark.usefixtures("fresh_workspace")

ops = torch.ops.lora_ext


def case(lead=(20,)):
    problem = make_problem(lead, 64, 48, 4, (F32, F32))
    return problem, quantized_rows(problem.weight)


# ---- the weight, between forward and backward ----


def in_place(tensor):
    """Changes bytes of a tensor of any dtype."""
    with torch.no_grad():
        tensor.copy_(tensor.clone())


def test_a_weight_that_changes_after_forward():
    problem, weight = case()
    for changed in (weight.codes, weight.scale):
        x = problem.x.clone().requires_grad_()
        y = lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b)
        in_place(changed)
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            y.backward(problem.grad)
    # Without dX nobody reads it.
    b = problem.lora_b.clone().requires_grad_()
    y = lora_ext.lora_linear(problem.x, weight, problem.lora_a, b)
    in_place(weight.codes)
    y.backward(problem.grad)
    assert b.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_weight_that_changes_after_forward(kind):
    model = lora_ext.accelerate(quantized_net(kind))
    base = model.base_model.model.blocks[1].up.base_layer
    tensors = quantized_base(base, make_x()).weight.tensors()
    assert len(tensors) >= 2  # codes and scales
    for tensor in tensors:
        if tensor.is_inference():  # as HQQ makes them, which torch lets nobody change
            assert kind == "hqq"
            continue
        y = model(make_x())
        in_place(tensor)
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            y.sum().backward()
    step(model, make_x())


def test_the_base_alone_that_changes_after_forward():
    """DoRA multiplies by the base alone."""
    pytest.importorskip("bitsandbytes")
    model = lora_ext.accelerate(quantized_net("bnb nf4", use_dora=True))
    base = model.base_model.model.blocks[1].up.base_layer
    y = model(make_x())
    in_place(base.weight)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.sum().backward()


def test_weights_made_in_inference_mode():
    """They have no versions to compare."""
    problem, _ = case()
    with torch.inference_mode():
        weight = quantized_rows(problem.weight)
    x = problem.x.clone().requires_grad_()
    lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b).backward(problem.grad)
    assert x.grad is not None


# ---- modes of a model, in turn ----


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_saving_and_training_in_turn(kind, dtype):
    """A layer of bitsandbytes changes its weight in eval mode, and back when it is saved."""
    model = quantized_net(kind, dtype)
    plain = copy.deepcopy(model)
    lora_ext.accelerate(model)
    x = make_x(dtype)
    for _ in range(2):
        results = []
        for one in (model, plain):
            one.eval()
            with torch.inference_mode():
                one(x)
            one.state_dict()
            one.train()
            results.append(step(one, x))
        assert set(paths(model).values()) == {"fused"}
        for name, value in results[1].items():
            error = (results[0][name] - value).abs().max()
            assert error <= (1e-4 if dtype == F32 else 1e-1) * value.abs().max(), name


def test_evaluation_between_forward_and_backward():
    """bitsandbytes changes the order of its codes meanwhile."""
    pytest.importorskip("bitsandbytes")
    model = lora_ext.accelerate(quantized_net("bnb nf4"))
    wanted = step(model, make_x())
    x = make_x().requires_grad_()
    y = model(x)
    model.eval()
    with torch.no_grad():
        model(make_x())
    model.train()
    generator = torch.Generator().manual_seed(4)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).float())
    # Scales are rounded to bfloat16 in the other order.
    error = (x.grad - wanted["dx"]).abs().max()
    assert error <= 1e-2 * wanted["dx"].abs().max()


@pytest.mark.parametrize("adapted", [["0", "2"], ["0", "1", "2"]], ids=["some", "all"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("way", ["peft", "ours"])
def test_training_goes_on_after_each_evaluation(way, nested, adapted):
    """Layers without adapters pass a gradient on, too, as bitsandbytes' panels do not."""
    pytest.importorskip("bitsandbytes")
    losses, target = {}, torch.randn(40, WIDTH)
    for every in (0, 5):
        torch.manual_seed(1)
        layers = [bnb_four_bits(nn.Linear(WIDTH, WIDTH), F32, nested=nested) for _ in range(3)]
        model = nn.Sequential(*layers).requires_grad_(False)
        if way == "ours":
            lora_ext.apply_lora(model, lora_ext.LoraConfig(adapted, r=4))
        else:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=adapted))
            lora_ext.accelerate(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        losses[every] = []
        for number in range(20):
            if every and number % every == 0:
                with torch.no_grad():
                    model.eval()(make_x().float())
                model.train()
            loss = (model(make_x().float()) - target[: len(make_x())]).square().mean()
            loss.backward()
            assert all(p.grad is not None for p in trained)
            optimizer.step()
            optimizer.zero_grad()
            losses[every].append(loss.item())
        assert way == "ours" or set(paths(model).values()) == {"fused"}
    # Where PEFT's layer is fused, the op reads panels, whose scales are rounded to bfloat16.
    assert losses[5] == pytest.approx(losses[0], rel=0 if way == "ours" else 2e-3)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_transforms_are_refused_and_without_gradients_work():
    problem, weight = case((6, 5))

    def call(x):
        return lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b)

    for transformed in (torch.vmap(call), torch.func.grad(lambda x: call(x).sum())):
        with pytest.raises(NotImplementedError, match=r"outside of torch\.func's transforms"):
            transformed(problem.x)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(call)(problem.x), call(problem.x))


def test_two_backwards():
    problem, weight = case()
    x = problem.x.clone().requires_grad_()
    y = lora_ext.lora_linear(x, weight, problem.lora_a, problem.lora_b)
    gradients = [torch.autograd.grad(y, x, problem.grad, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def test_no_grad_takes_the_op_that_saves_nothing():
    problem, weight = case()
    a = problem.lora_a.clone().requires_grad_()
    with torch.no_grad(), torch.profiler.profile() as profile:
        lora_ext.lora_linear(problem.x, weight, a, problem.lora_b)
    names = {event.name for event in profile.events()}
    assert "lora_ext::lora" in names and "lora_ext::lora_forward" not in names


# ---- the workspace ----


class Broken(Rows):
    """One that fails while it writes."""

    def dequantize(self, dtype, out=None):
        if out is not None:
            raise ValueError("broken codes")
        return super().dequantize(dtype, out)


def test_an_error_gives_the_workspace_back():
    problem, weight = case()
    operands = problem.lora_a, problem.lora_b
    lora_ext.lora_linear(problem.x, weight, *operands)
    kept = workspace.nbytes()
    with pytest.raises(RuntimeError, match="lora_b"):
        lora_ext.lora_linear(problem.x, weight, problem.lora_a, problem.lora_b[:-1])
    with pytest.raises(ValueError, match="broken codes"):
        lora_ext.lora_linear(problem.x, Broken(weight.codes, weight.scale), *operands)
    assert workspace.nbytes() == kept > 0


class Nested(Rows):
    """One that runs another layer while it is dequantised."""

    inner = None

    def dequantize(self, dtype, out=None):
        if out is not None:
            self.inner()
        return super().dequantize(dtype, out)


def test_a_layer_within_a_layer():
    problem, weight = case()
    nested = Nested(weight.codes, weight.scale)
    operands = problem.x, problem.lora_a, problem.lora_b

    def call(w):
        return lora_ext.lora_linear(operands[0], w, *operands[1:])

    wanted = call(weight)
    nested.inner = lambda: call(quantized_rows(problem.weight + 1))
    assert torch.equal(call(nested), wanted)


def test_meta_tensors_leave_no_workspace():
    problem, weight = case()
    meta = Rows(weight.codes.to("meta"), weight.scale.to("meta"))
    y = lora_ext.lora_linear(
        problem.x.to("meta"), meta, problem.lora_a.to("meta"), problem.lora_b.to("meta")
    )
    assert y.is_meta and y.shape == (20, 48)
    assert workspace.nbytes() == 0


@pytest.mark.parametrize("kind", [p for p in KINDS if p.values[0].startswith("torchao")])
def test_a_model_on_meta(kind):
    """Layers of bitsandbytes and HQQ have no `to` that moves there."""
    model = lora_ext.accelerate(quantized_net(kind)).to("meta")
    y = model(make_x().to("meta"))
    assert y.is_meta and y.shape == (12, 64) and workspace.nbytes() == 0


def test_four_bits_on_meta_with_scales_on_the_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    from lora_ext.quantized.of_bitsandbytes import FourBitWeight

    packed, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    weight = FourBitWeight(packed.to("meta"), state)
    found = weight.dequantize(BF16)
    assert found.is_meta and found.shape == (32, 64) and found.dtype == BF16


@pytest.mark.parametrize("shape", [(0, 64), (48, 0), (0, 0)], ids=str)
def test_empty_weights(shape):
    weight = Rows(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0]))
    dense = weight.dequantize(F32)
    results = []
    for w in (weight, dense):
        x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
        a, b = torch.ones(4, shape[1]), torch.ones(shape[0], 4)
        try:
            y = lora_ext.lora_linear(x, w, a, b)
            y.sum().backward()
            results.append((y.detach(), x.grad))
        except RuntimeError as error:
            results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


# ---- the kernels ----


def test_tensors_of_two_devices():
    """A meta tensor among the others must not leave `out` as it is."""
    codes, scale = torch.zeros(4, 6, dtype=torch.int8), torch.rand(4)
    with pytest.raises(RuntimeError, match="on out's device, cpu, but got it on meta"):
        ops.dequantize("8bit", codes.to("meta"), scale, torch.empty(4, 6), block=6)
    with pytest.raises(RuntimeError, match="on out's device, cpu, but got it on meta"):
        ops.dequantize("8bit", codes, scale.to("meta"), torch.empty(4, 6), block=6)
    with pytest.raises(RuntimeError, match="on out's device, meta, but got it on cpu"):
        ops.dequantize("8bit", codes, scale, torch.empty(4, 6, device="meta"), block=6)


@pytest.mark.parametrize("block", [2**62, 2**63 - 2])
def test_blocks_larger_than_any_weight(block):
    packed = torch.arange(32, dtype=torch.uint8)
    table, out = torch.linspace(-1, 1, 16), torch.empty(64)
    ops.dequantize("4bit", packed, torch.tensor([2.0]), out, table=table, block=block)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    assert torch.equal(out, table[codes] * 2.0)
    with pytest.raises(RuntimeError, match="expected scale of 1 elements, but got 2"):
        ops.dequantize("4bit", packed, torch.ones(2), out, table=table, block=block)


def test_scales_in_another_dtype():
    """As after a checkpoint whose tensors were all cast."""
    pytest.importorskip("bitsandbytes")
    from lora_ext.quantized.of_bitsandbytes import eight_bit_weight

    codes = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    scale = torch.rand(8) + 0.5
    for cast in (scale.half(), scale.bfloat16(), torch.stack([scale, scale], 1)[:, 0]):
        found = eight_bit_weight(codes, cast).dequantize(F32)
        wanted = codes * (cast.float() / 127)[:, None]
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


# ---- casts and state dicts, beside PEFT ----


def fused(model):
    """The model accelerated, all its layers on the op."""
    lora_ext.accelerate(model)
    assert set(paths(model).values()) == {"fused"}
    return model


def assert_same(found, wanted, tolerance=0.0):
    assert found.keys() == wanted.keys() and len(found) == 10  # y, dx, two factors of four layers
    for name, value in wanted.items():
        scale = value.abs().max().item()
        assert scale > 0 and found[name].dtype == value.dtype
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype(kind):
    """`model.to(dtype)` gives what it gives PEFT, and back again."""
    model = quantized_net(kind)
    plain = copy.deepcopy(model)
    fused(model)
    for dtype in (BF16, F32):
        model.to(dtype)
        plain.to(dtype)
        x = make_x(dtype)
        if kind == "hqq" and dtype == BF16:  # whose compute_dtype stays what it was
            for one in (model, plain):
                with pytest.raises(RuntimeError, match="same dtype"):
                    one(x)
            continue
        found, wanted = step(model, x), step(plain, x)
        assert_same(found, wanted, 1e-5 if dtype == F32 else 5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    """The keys and bytes of the model without us; adapters load into another model."""
    model = quantized_net(kind)
    before = {name: value for name, value in model.state_dict().items()}
    fused(model)
    step(model, make_x())
    after = model.state_dict()
    assert list(after) == list(before)
    other = fused(quantized_net(kind))
    randomize(other, seed=1)
    wanted = step(model, make_x())
    assert (step(other, make_x())["y"] - wanted["y"]).abs().max() > 0
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert_same(step(other, make_x()), wanted)
    adapters = {name: value for name, value in after.items() if "lora_" in name}
    assert other.load_state_dict(adapters, strict=False).unexpected_keys == []

"""The layers under torch.compile, export, checkpointing, autocast and functional transforms.

How often torch.compile compiles (the tests below hold it to these numbers):

    another batch size              once more, then never (once in all with dynamic=True)
    other values of the adapters    never: copy_, an optimizer, load_state_dict, a new Parameter
    set_adapter                     once for each choice of names, in their order; never again for
                                    a choice that was seen
    requires_grad, no_grad          once for each state that was not seen
    merge, unmerge, eval, train     once for each state; merging again, never
    equal layers compiled apart     once for all of them
"""

import copy
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import BF16, F32, F64
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_ext
from lora_ext import AdapterSpec, LoRAConfig, LoRALinear, LoRAMergedLinear, apply_lora, lora_layers

pytestmark = pytest.mark.usefixtures("forget_graphs")

IN, OUT = 16, 24


# ---- layers ----


def randomized(module):
    """No factor is zero: each of them takes part in y and gets a gradient."""
    for _, layer in lora_layers(module):
        for table in (layer.lora_a, layer.lora_b, layer.lora_bias):
            for parameter in table.values():
                nn.init.normal_(parameter, std=0.5)
    return module


def linear(dropout=0.0, **options):
    return randomized(LoRALinear(IN, OUT, r=3, alpha=6, dropout=dropout, **options))


def several(dropout=0.0, alphas=(6, 4), dropouts=None):
    """Three active adapters of different ranks."""
    layer = LoRALinear(IN, OUT, r=3, alpha=6, dropout=dropout)
    others = zip(("second", "third"), (2, 4), alphas, dropouts or (dropout, dropout), strict=True)
    for name, rank, alpha, p in others:
        layer.add_adapter(name, AdapterSpec(rank, alpha, p))
    layer.set_adapter(["default", "second", "third"])
    return randomized(layer)


def merged(dropout=0.0, **options):
    layer = linear(dropout, **options).eval()
    layer.merge()
    return layer


class Disabled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with self.layer.disable_adapters():
            return self.layer(x)


def disabled(dropout=0.0):
    return Disabled(linear(dropout))


def none_active(dropout=0.0):
    layer = linear(dropout)
    layer.set_adapter(())
    return layer


def projections(dropout=0.0):
    layer = LoRAMergedLinear(IN, OUT, r=0)
    layer.enable_groups([True, False, True])
    layer.add_adapter("default", AdapterSpec(2, 4, dropout))
    return randomized(layer)


def adapted(module, dropout=0.0, **options):
    holder = nn.Sequential(module)
    return randomized(apply_lora(holder, LoRAConfig("0", r=3, alpha=6, dropout=dropout, **options)))


def convolution(dropout=0.0, **options):
    return adapted(nn.Conv2d(IN, OUT, 1, **options), dropout)


def embedding(dropout=0.0):
    return adapted(nn.Embedding(11, IN, padding_idx=2), dropout)


class Block(nn.Module):
    """A transformer block over token ids, with adapters in all seven of its layers."""

    def __init__(self, width=IN, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids):
        x = self.embed(ids)
        normed = self.norm_1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def block(dropout=0.0):
    names = ["embed", "q", "k", "v", "o", "up", "down"]
    model = apply_lora(Block(), LoRAConfig(names, r=3, alpha=6, dropout=dropout, bias="all"))
    return randomized(model)


ROWS = (60, IN)
IMAGES = (2, IN, 4, 6)
# name -> (how to make it from dropout, the shape of x or None for token ids)
LAYERS = {
    "linear": (linear, ROWS),
    "batch": (linear, (2, 3, 10, IN)),
    "one row": (linear, (IN,)),
    "lora_bias": (partial(linear, lora_bias=True), ROWS),
    "no bias": (partial(linear, bias=False), ROWS),
    "pissa": (partial(linear, init="pissa"), ROWS),
    "olora": (partial(linear, init="olora"), ROWS),
    "fan_in_fan_out": (partial(linear, fan_in_fan_out=True), ROWS),
    "float64": (partial(linear, dtype=F64), ROWS),
    "bfloat16": (partial(linear, dtype=BF16), ROWS),
    "several": (several, ROWS),
    "several, one scaling": (partial(several, alphas=(4, 8)), ROWS),
    "several, other dropout": (partial(several, dropouts=(0.0, 0.6)), ROWS),
    "projections": (projections, ROWS),
    "merged": (merged, ROWS),
    "merged lora_bias": (partial(merged, lora_bias=True), ROWS),
    "disabled": (disabled, ROWS),
    "none active": (none_active, ROWS),
    "convolution": (convolution, IMAGES),
    "strided convolution": (partial(convolution, stride=2), IMAGES),
    "embedding": (embedding, None),
    "block": (block, None),
}
UNTRAINED = ("merged", "merged lora_bias", "disabled", "none active")


def make(name, dropout, device="cpu"):
    """(module, x)"""
    factory, shape = LAYERS[name]
    module = factory(dropout).to(device)
    if shape is None:
        return module, torch.randint(11, (3, 7), device=device)
    return module, torch.randn(shape, dtype=next(module.parameters()).dtype, device=device)


def run(function, module, x, wants_dx=True, seed=7):
    """A step of function, which calls module: name -> y, dx and the gradients; None if none.

    Gradients of a loss that is not linear, so that they depend on y.
    """
    module.zero_grad()
    x = x.detach().clone()
    if wants_dx and x.is_floating_point():
        x.requires_grad_()
    torch.manual_seed(seed)
    y = function(x)
    if y.requires_grad:
        y.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def differing(first, second):
    """Names of what is not the same bit for bit."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not same_bits(value, second[name])]


def same_bits(value, other):
    if value is None or other is None:
        return value is other
    return value.dtype == other.dtype and torch.equal(value, other)


def assert_same(first, second):
    assert differing(first, second) == []


def adapter_gradients(result):
    return {name: value for name, value in result.items() if name.endswith(".default")}


def assert_trained(result):
    """The gradients of the adapters are there and not zero: what is compared with them says
    something."""
    for name, value in adapter_gradients(result).items():
        if "_init" not in name:
            assert value is not None and value.abs().max() > 0, name


# ---- one graph, the same bits ----


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layer_is_one_graph_with_the_same_bits(device, counter, name, dropout):
    module, x = make(name, dropout, device)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    eager = run(module, module, x)
    if name in UNTRAINED:
        assert all(value is None for value in adapter_gradients(eager).values())
    else:
        assert_trained(eager)
    assert_same(run(compiled, module, x), eager)
    # A second call draws other masks, by eager's generator, and finds the graph.
    assert_same(run(compiled, module, x, seed=8), run(module, module, x, seed=8))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["linear", "several, other dropout", "strided convolution"])
def test_dropout_changes_with_the_seed_in_training_alone(counter, name):
    module, x = make(name, 0.4)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    assert "y" in differing(run(compiled, module, x, seed=1), run(compiled, module, x, seed=2))
    module.eval()
    assert_same(run(compiled, module, x, seed=1), run(compiled, module, x, seed=2))
    assert_same(run(compiled, module, x), run(module, module, x))


@pytest.mark.parametrize("name", ["linear", "several, other dropout", "strided convolution"])
def test_inductor(name):
    module, x = make(name, 0.4)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = run(torch.compile(module, fullgraph=True), module, x)
    eager = run(module, module, x)
    assert_trained(eager)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-5, atol=1e-5, msg=key)


# ---- recompiles ----


@pytest.mark.parametrize("name", ["linear", "several", "several, other dropout"])
def test_batch_sizes_compile_once_more(counter, name):
    module, _ = make(name, 0.4)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for count, rows in ((1, 8), (2, 60), (2, 51), (2, 130), (2, 700), (2, 8)):
        x = torch.randn(rows, IN)
        assert_same(run(compiled, module, x), run(module, module, x))
        assert counter.frame_count == count, rows


def test_batch_sizes_with_dynamic_shapes_never_recompile(counter):
    module, _ = make("linear", 0.4)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows in (8, 60, 51, 130, 700):
        x = torch.randn(rows, IN)
        assert_same(run(compiled, module, x), run(module, module, x))
        counts.append(counter.frame_count)
    # The first call may start over: it makes symbols of floats, and finds that they are constants.
    assert counts[0] <= 2 and set(counts) == {counts[0]}


def test_other_values_do_not_recompile(counter):
    layer, x = make("linear", 0.4)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)

    def other_values():
        return {key: torch.randn_like(value) for key, value in layer.state_dict().items()}

    def check():
        assert_same(run(compiled, layer, x), run(layer, layer, x))
        assert counter.frame_count == 1
        return layer(x).detach()

    results = [check()]
    with torch.no_grad():
        layer.lora_b["default"].copy_(torch.randn(OUT, 3))
    results.append(check())
    layer.load_state_dict(other_values())
    results.append(check())
    layer.lora_a["default"].data = torch.randn(3, IN)
    results.append(check())
    layer.lora_b["default"] = nn.Parameter(torch.randn(OUT, 3))
    results.append(check())
    frozen = {key: p.requires_grad for key, p in layer.named_parameters()}
    layer.load_state_dict(other_values(), assign=True)
    assert frozen == {key: p.requires_grad for key, p in layer.named_parameters()}
    results.append(check())
    for first, second in pairwise(results):
        assert not torch.equal(first, second)


def test_compiled_training_is_eager_training(counter):
    """Ten steps of an optimizer: the same parameters, bit for bit, from one graph."""
    models = [block(dropout=0.4), block(dropout=0.4)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [models[0], torch.compile(models[1], backend=counter, fullgraph=True)]
    ids = torch.randint(11, (10, 3, 7))
    for model, step in zip(models, steps, strict=True):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(lora_ext.lora_plus_groups(model, 0.01))
        for batch in ids:
            step(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert counter.frame_count == 1


def do(action, layer, disabling):
    if isinstance(action, list):
        layer.set_adapter(action)
    elif action == "add and delete":
        layer.add_adapter("fourth", AdapterSpec(2, 3))
        layer.delete_adapter("fourth")
    elif action == "merge second":
        layer.merge("second")
    elif action == "disable":
        disabling.enter_context(layer.disable_adapters())
    elif action == "enable":
        disabling.close()
    else:
        getattr(layer, action)()


# (what is done to the layer, graphs after the next call)
SWITCHES = [
    (["default"], 1),
    (["second"], 2),
    (["default"], 2),
    (["third"], 3),
    (["second"], 3),
    (["default", "second"], 4),
    (["second", "default"], 5),  # another order of the sum
    (["default", "second"], 5),
    (["default", "second", "third"], 6),
    ([], 7),
    (["default"], 7),
    ("disable", 8),
    ("enable", 8),
    ("add and delete", 8),
    ("eval", 9),
    ("merge", 10),
    ("unmerge", 10),
    ("merge", 10),
    ("train", 10),
    ("eval", 10),
    (["default", "second"], 11),
    ("merge second", 12),
    ("unmerge", 12),
    ("merge second", 12),
    ("merge", 13),
    ("train", 13),
]


def test_switching_adapters_compiles_once_for_each_state(counter):
    layer = several(0.4, dropouts=(0.0, 0.6))
    x = torch.randn(ROWS)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    results = []
    with torch._dynamo.config.patch(recompile_limit=32), ExitStack() as disabling:
        for action, _ in SWITCHES:
            do(action, layer, disabling)
            assert_same(run(compiled, layer, x), run(layer, layer, x))
            results.append((action, counter.frame_count))
    assert results == SWITCHES


def test_equal_blocks_share_a_graph(counter):
    """Compiling block by block: what the first one compiles serves the others."""
    model = nn.Sequential(*(Pair() for _ in range(6)))
    apply_lora(model, LoRAConfig("all-linear", r=2, dropout=0.4))
    randomized(model)
    eager = copy.deepcopy(model)
    for module in model:
        module.compile(backend=counter, fullgraph=True)
    x = torch.randn(ROWS)
    assert_same(run(model, model, x), run(eager, eager, x))
    assert counter.frame_count == 1
    for one in (model, eager):
        apply_lora(one, LoRAConfig("all-linear", r=4), "second")
        lora_ext.set_adapter(one, "second")
        torch.manual_seed(1)
        randomized(one)
    assert_same(run(model, model, x), run(eager, eager, x))
    assert counter.frame_count == 2


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def test_more_adapters_than_torch_keeps_graphs(counter):
    """Each adapter has its graph: torch keeps 8 unless told otherwise, and then runs eagerly."""
    layer = LoRALinear(IN, OUT, r=2)
    names = [f"user{number}" for number in range(4)]
    for name in names:
        layer.add_adapter(name, AdapterSpec(2, 4))
    randomized(layer)
    x = torch.randn(ROWS)
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(layer, backend=counter)
        for name in names:
            layer.set_adapter(name)
            assert_same(run(compiled, layer, x), run(layer, layer, x))
        assert counter.frame_count == 2
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        with pytest.raises(FailOnRecompileLimitHit):
            for name in names:
                layer.set_adapter(name)
                compiled(x)


@pytest.mark.parametrize("name", ["linear", "several, other dropout", "lora_bias"])
def test_where_requires_grad_differs(counter, name):
    layer, x = make(name, 0.4)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    states = [
        ("lora_a", "lora_b"),
        ("x", "lora_a", "lora_b"),
        ("x", "lora_b"),
        ("x", "lora_a", "bias"),
        ("x",),
        ("bias",),
        (),
    ]
    for _ in range(2):  # the second time every graph is there
        for wanted in states:
            for key, parameter in layer.named_parameters():
                parameter.requires_grad_(key.split(".")[0] in wanted)
            eager = run(layer, layer, x, "x" in wanted)
            assert (eager["bias"] is not None) == ("bias" in wanted)
            assert_same(run(compiled, layer, x, "x" in wanted), eager)
    assert counter.frame_count == len(states)


@pytest.mark.parametrize("name", ["linear", "merged lora_bias", "embedding", "convolution"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_and_back(counter, name, mode):
    module, x = make(name, 0.0)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for _ in range(2):
        with mode():
            assert torch.equal(compiled(x), module(x))
        assert_same(run(compiled, module, x), run(module, module, x))
    assert counter.frame_count == 2


def test_packed_weight_is_not_used_in_a_graph(counter):
    """oneDNN's layout has no fake tensors: the graph takes the plain weight, and its bits."""
    layer, x = make("linear", 0.0)
    eager = run(layer, layer, x)
    assert layer.pack_weight(backward=True).is_packed
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    assert_same(run(compiled, layer, x), eager)
    assert layer.packed is not None
    layer.packed = None
    assert_same(run(compiled, layer, x), eager)
    assert counter.frame_count <= 2


# ---- changes inside the compiled function ----


@pytest.mark.parametrize("whole_model", [False, True])
def test_adapters_disabled_inside_one_graph(counter, whole_model):
    """The model and its reference in one step, as in preference optimization."""
    model = nn.Sequential(linear(0.4), nn.Linear(OUT, 4))

    def step(x):
        disabling = lora_ext.disable_adapters(model) if whole_model else model[0].disable_adapters()
        with disabling:
            reference = model(x)
        return model(x) - reference

    x = torch.randn(ROWS)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(2):
        eager = run(step, model, x)
        assert_trained(eager)
        assert_same(run(compiled, model, x), eager)
        assert model[0].adapters_enabled
    assert counter.frame_count == 1


def test_adapters_switched_and_merged_inside_a_compiled_function(counter):
    """Graph breaks, and the right result; fullgraph refuses."""
    layer = several().eval()

    def step(x):
        layer.set_adapter("second")
        first = layer(x)
        layer.set_adapter(("default", "third"))
        second = layer(x)
        layer.merge()
        third = layer(x)
        layer.unmerge()
        return torch.stack([first, second, third])

    x = torch.randn(ROWS)
    eager = step(x)
    assert not torch.equal(eager[0], eager[1])
    assert torch.equal(torch.compile(step, backend=counter)(x), eager)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad"):
        torch.compile(step, backend=counter, fullgraph=True)(x)


# ---- checkpointing ----


def checkpointed(module, use_reentrant, **options):
    def step(x):
        def region(x):
            return F.relu(module(x))

        return checkpoint(region, x, use_reentrant=use_reentrant, **options)

    return step


def plain_region(module):
    return lambda x: F.relu(module(x))


CHECKPOINTED = ["linear", "several", "several, other dropout", "pissa", "strided convolution"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoint_with_dropout_gives_the_same_bits(device, name, use_reentrant):
    """The recomputation draws the forward pass's masks again."""
    module, x = make(name, 0.4, device)
    plain = run(plain_region(module), module, x)
    assert_trained(plain)
    assert "dx" in differing(run(plain_region(module), module, x, seed=8), plain)
    assert_same(run(checkpointed(module, use_reentrant), module, x), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "several, other dropout"])
def test_checkpoint_under_autocast(name, use_reentrant):
    """Backward, outside the region, recomputes under the autocast of forward."""
    module, x = make(name, 0.4)

    def under_autocast(function):
        def step(x):
            with torch.autocast("cpu", BF16):
                return function(x)

        return step

    plain = run(under_autocast(plain_region(module)), module, x)
    assert plain["y"].dtype == BF16
    assert_trained(plain)
    assert_same(run(under_autocast(checkpointed(module, use_reentrant)), module, x), plain)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_compile_checkpoint_and_dropout(device, counter, name):
    """peft#3020: the three together, in one graph."""
    module, x = make(name, 0.4, device)
    plain = run(plain_region(module), module, x)
    assert_trained(plain)
    compiled = torch.compile(checkpointed(module, False), backend=counter, fullgraph=True)
    assert_same(run(compiled, module, x), plain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_a_compiled_region(counter, use_reentrant):
    module, x = make("several, other dropout", 0.4)
    plain = run(plain_region(module), module, x)
    region = torch.compile(plain_region(module), backend=counter, fullgraph=True)

    def step(x):
        return checkpoint(region, x, use_reentrant=use_reentrant)

    assert_same(run(step, module, x), plain)


def save_products(_context, op, *_args, **_kwargs):
    """A policy of selective checkpointing: our products are kept, the rest is recomputed."""
    if op is torch.ops.lora_ext.lora_linear_forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint(counter):
    module, x = make("linear", 0.4)
    plain = run(plain_region(module), module, x)
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    step = checkpointed(module, False, context_fn=contexts)
    assert_same(run(step, module, x), plain)
    assert_same(run(torch.compile(step, backend=counter, fullgraph=True), module, x), plain)


def test_checkpoint_wrapper_is_not_in_the_names(tmp_path):
    """torch leaves it out of state dicts, and so do all functions that go by names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from lora_ext.adapters import load_adapter, save_adapter

    def make_model():
        torch.manual_seed(0)
        model = nn.Sequential(Pair(), Pair(), nn.Linear(IN, 2))
        config = LoRAConfig("all-linear", r=2, dropout=0.4, modules_to_save=("2",))
        return randomized(apply_lora(model, config))

    plain, wrapped = make_model(), make_model()
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    wrapped[1].up = checkpoint_wrapper(wrapped[1].up)
    wrapped[2] = checkpoint_wrapper(wrapped[2])
    x = torch.randn(ROWS)
    assert torch.equal(run(wrapped, wrapped, x)["y"], run(plain, plain, x)["y"])
    for states in (
        [lora_ext.lora_state_dict(model, bias="lora_only") for model in (plain, wrapped)],
        [lora_ext.loralib_state_dict(model) for model in (plain, wrapped)],
    ):
        assert len(states[0]) >= 8
        assert_same(*states)
    assert [row.name for row in lora_ext.explain(wrapped)] == [
        row.name for row in lora_ext.explain(plain)
    ]
    save_adapter(wrapped, tmp_path)
    loaded = nn.Sequential(Pair(), Pair(), nn.Linear(IN, 2))
    loaded.load_state_dict(plain_weights(plain))
    load_adapter(loaded, tmp_path)
    assert_same(dict(loaded.state_dict()), dict(plain.state_dict()))


def plain_weights(model):
    return {key: value for key, value in model.state_dict().items() if ".lora_" not in key}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_compiled_autograd(counter, is_compiled):
    module, x = make("linear", 0.4)
    plain = run(module, module, x)
    forward = torch.compile(module, backend=counter, fullgraph=True) if is_compiled else module
    compile_backward = partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compile_backward):
        assert_same(run(forward, module, x), plain)


# ---- autocast ----


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["linear", "lora_bias", "merged lora_bias", "embedding", "block"])
def test_compiled_under_autocast(device, counter, name, inside):
    """With the region inside the graph, or around the compiled module."""
    module, x = make(name, 0.4, device)
    autocast = partial(torch.autocast, device, BF16)

    def region(x):
        with autocast():
            return module(x)

    eager = run(region, module, x)
    if name != "embedding":
        assert eager["y"].dtype == (F32 if name == "block" else BF16)
    if inside:
        compiled = torch.compile(region, backend=counter, fullgraph=True)
    else:
        graph = torch.compile(module, backend=counter, fullgraph=True)

        def compiled(x):
            with autocast():
                return graph(x)

    result = run(compiled, module, x)
    assert result["y"].dtype == eager["y"].dtype
    assert counter.frame_count == 1
    for key, value in eager.items():
        if name == "block" and value is not None:
            # x's three casts to bfloat16 are one in eager, whose gradients then add up in bfloat16.
            torch.testing.assert_close(result[key], value, rtol=0.05, atol=0.05, msg=key)
        else:
            assert differing({key: result[key]}, {key: value}) == []


def test_autocast_state_is_part_of_the_guards(counter):
    layer, x = make("linear", 0.0)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for enabled in (True, False, True, False):
        with torch.autocast("cpu", BF16, enabled=enabled):
            y = compiled(x)
            assert torch.equal(y, layer(x))
        assert y.dtype == (BF16 if enabled else F32)
    assert counter.frame_count == 2


# ---- export ----


@pytest.mark.parametrize(
    "name",
    ["linear", "lora_bias", "pissa", "several", "projections", "merged lora_bias", "none active"],
)
def test_export(tmp_path, name):
    """Any number of rows, saved and loaded; without dropout, as in eval."""
    layer, x = make(name, 0.4)
    layer.eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    is_base = name in UNTRAINED
    assert targets.count("lora_ext.lora_linear.default") == (0 if is_base else 1)
    assert not any("rand" in target or "dropout" in target for target in targets)
    assert {"weight", "lora_a.default"} <= set(program.state_dict)
    torch.export.save(program, tmp_path / "layer.pt2")
    for exported in (program, torch.export.load(tmp_path / "layer.pt2")):
        for y in (x, torch.randn(7, IN)):
            assert torch.equal(exported.module()(y), layer(y))


@pytest.mark.parametrize("name", ["convolution", "embedding", "block"])
def test_export_of_other_layers(name):
    module, x = make(name, 0.4)
    module.eval()
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), module(x))


def test_export_in_training_draws_a_seed():
    layer, x = make("linear", 0.4)
    exported = torch.export.export(layer, (x,)).module()
    results = []
    for function in (exported, layer):
        torch.manual_seed(5)
        results.append(function(x))
    assert torch.equal(*results)
    assert not torch.equal(exported(x), exported(x))


# ---- inference mode ----


def test_made_in_inference_mode():
    """A merge there leaves nothing that a later step trips over, and adapters made there train."""
    layer, x = make("lora_bias", 0.0)
    with torch.inference_mode():
        layer.eval()
        layer.merge()
        inside = layer(x)
        layer.add_adapter("second", AdapterSpec(2, 4))
    merged_step = run(layer, layer, x)
    assert torch.equal(merged_step["y"], inside)
    assert merged_step["dx"] is not None
    layer.train()
    layer.set_adapter("second")
    step = run(layer, layer, x)
    assert step["lora_b.second"].abs().max() > 0


def test_merged_tensors_are_no_part_of_a_graph():
    """A merged lora_bias too: copies are possible, and each backward is the first one."""
    layer, x = make("merged lora_bias", 0.0)
    assert not layer.merged_weight.requires_grad
    assert not layer.merged_bias.requires_grad
    copied = copy.deepcopy(layer)
    for _ in range(2):
        assert_same(run(copied, copied, x), run(layer, layer, x))


# ---- functional transforms ----


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["linear", "several", "pissa", "lora_bias"])
def test_functional_call(counter, name, is_compiled):
    layer, x = make(name, 0.4)
    values = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    before = copy.deepcopy(layer.state_dict())
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(values)

    def call(values, x):
        return functional_call(layer, values, (x,))

    if is_compiled:
        call = torch.compile(call, backend=counter, fullgraph=True)
    results = []
    for function in (partial(call, values), loaded):
        torch.manual_seed(5)
        results.append(function(x))
    assert torch.equal(*results)
    assert_same(layer.state_dict(), before)


def test_functional_call_does_not_use_the_pack_of_another_weight():
    layer, x = make("linear", 0.0)
    layer.pack_weight()
    weight = torch.randn(OUT, IN)
    plain = F.linear(x, weight, layer.bias)
    update = x @ layer.lora_a["default"].T @ layer.lora_b["default"].T * 2
    y = functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(y, plain + update, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["linear", "several", "lora_bias", "merged", "convolution"])
def test_vmap_over_x_is_a_loop(name):
    module, x = make(name, 0.0)
    batch = torch.stack([x, x + 1, x * 2])
    with torch.no_grad():
        one_by_one = torch.stack([module(one) for one in batch])
        torch.testing.assert_close(vmap(module)(batch), one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_adapters_is_a_loop():
    layer, x = make("linear", 0.0)
    stacks = {key: torch.stack([p, p + 1, p * 2]) for key, p in layer.named_parameters()}
    stacks = {key: value.detach() for key, value in stacks.items() if key.startswith("lora_")}

    def call(values):
        return functional_call(layer, values, (x,))

    loop = [call({key: stack[i] for key, stack in stacks.items()}) for i in range(3)]
    assert torch.equal(vmap(call)(stacks), torch.stack(loop))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_dropout():
    """Refused unless the caller says what to do; then the masks differ, or are one."""
    layer = LoRALinear(IN, OUT, r=1, alpha=1, dropout=0.5, bias=False)
    for tensor, value in (("weight", 0.0), ("lora_a", 1.0), ("lora_b", 1.0)):
        held = getattr(layer, tensor)
        nn.init.constant_(held if tensor == "weight" else held["default"], value)
    # x = 2^k in column k: y spells the mask in binary.
    x = torch.exp2(torch.arange(float(IN))).repeat(4, 6, 1)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(layer)(x)
        for randomness, masks in (("different", 24), ("same", 6)):
            spelled = vmap(layer, randomness=randomness)(x)[..., 0] / 2
            assert torch.equal(spelled, spelled.round())
            assert len(set(spelled.flatten().tolist())) == masks
            kept = spelled.long()[..., None] >> torch.arange(IN) & 1
            assert 0.3 < kept.float().mean().item() < 0.7


@pytest.mark.parametrize("per_sample", [False, True])
def test_func_grad_is_refused(per_sample):
    """torch has no functional transform of a C++ autograd Function; the reference has all."""
    layer, x = make("linear", 0.0)
    factors = {
        f"{table}.default": getattr(layer, table)["default"].detach()
        for table in ("lora_a", "lora_b")
    }

    def loss(factors, x):
        return functional_call(layer, factors, (x,)).square().sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        (vmap(grad(loss), (None, 0)) if per_sample else grad(loss))(factors, x)

    def reference(factors, x):
        lora_a, lora_b = factors["lora_a.default"], factors["lora_b.default"]
        y = lora_ext.reference.lora_linear_reference(
            x, layer.weight, lora_a, lora_b, layer.bias, layer.adapters["default"].scaling
        )
        return y.square().sum()

    eager = run(layer, layer, x)
    for key, value in grad(reference)(factors, x).items():
        torch.testing.assert_close(value, eager[key], rtol=1e-5, atol=1e-3)


def test_forward_mode_is_refused_unless_merged():
    layer, x = make("linear", 0.0)
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        jvp(layer, (x,), (x,))
    layer.eval()
    layer.merge()
    tangent = torch.randn_like(x)
    y, dy = jvp(layer, (x,), (tangent,))
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(dy, tangent @ layer.merged_weight.T)


# ---- in-place operations and hooks ----


@pytest.mark.parametrize(
    "name", ["linear", "several", "lora_bias", "merged", "convolution", "one row"]
)
def test_an_in_place_activation_on_the_output(counter, name):
    """The output is nobody else's: neither an input's view nor what backward needs."""
    module, x = make(name, 0.4)
    plain = run(lambda x: F.relu(module(x)), module, x)

    def in_place(x):
        return F.relu_(module(x))

    assert_same(run(in_place, module, x), plain)
    assert_same(run(torch.compile(in_place, backend=counter, fullgraph=True), module, x), plain)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_hooks(counter, is_compiled):
    """Those of the module, before and after, and those of the factors."""
    layer, x = make("linear", 0.0)
    seen = []
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    layer.register_forward_hook(lambda *call: call[-1].tanh())
    layer.register_full_backward_hook(lambda *call: seen.append(("module", call[2][0].shape)))
    layer.lora_a["default"].register_hook(lambda gradient: gradient * 3)
    layer.lora_b["default"].register_post_accumulate_grad_hook(
        lambda factor: seen.append(("lora_b", factor.grad.shape))
    )
    function = torch.compile(layer, backend=counter) if is_compiled else layer
    hooked = run(function, layer, x)
    assert sorted(seen) == [("lora_b", (OUT, 3)), ("module", (60, OUT))]
    plain = copy.deepcopy(layer)
    for table in (plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks):
        table.clear()
    by_hand = run(lambda x: plain(x * 2).tanh(), plain, x)
    by_hand["lora_a.default"] *= 3
    for key, value in by_hand.items():
        torch.testing.assert_close(hooked[key], value, rtol=1e-5, atol=1e-5, msg=key)

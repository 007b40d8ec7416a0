"""An adapter for each sample through experts and routers of whole models: PEFT's `adapter_names`,
which PEFT refuses for experts, and `use_adapters`, against each adapter alone on its samples."""

import pytest
import torch
from expert_helpers import BY_PRODUCTS, make_routes
from expert_helpers import mixture as experts_of_peft
from mixture_helpers import mixture, randomized, some_ids
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft_helpers import plain_copy
from torch import nn

import lora_ext
from lora_ext.rows import rows_apart

# fr and de are on experts and routers, too, it on attention alone.
NAMES = ["fr", None, "it", "de", "fr"]
KINDS = ("qwen3_moe", "mixtral", "gpt_oss")


def of_peft(kind, **words):
    configs = {
        name: LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=["q_proj"],
            target_parameters=targets,
        )
        for name, rank, alpha, targets in (
            ("fr", 3, 6, parameters_of(kind)),
            ("de", 2, -3, parameters_of(kind)),
            ("it", 2, 4, None),
        )
    }
    model = get_peft_model(
        mixture(kind, **words), configs["fr"], "fr", autocast_adapter_dtype=False
    )
    for name in ("de", "it"):
        model.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    return lora_ext.accelerate(randomized(model))


def parameters_of(kind):
    router = {"gpt_oss": "mlp.router.weight"}.get(kind, "mlp.gate.weight")
    return ["experts.gate_up_proj", "experts.down_proj", router]


def of_ours(kind, **words):
    model = mixture(kind, **words)
    targets = ["all-linear", "mlp.router" if kind == "gpt_oss" else "mlp.gate"]
    lora_ext.apply_lora(model, lora_ext.LoraConfig(targets, r=3, lora_alpha=6), "fr")
    lora_ext.apply_lora(model, lora_ext.LoraConfig(targets, r=2, lora_alpha=-3), "de")
    lora_ext.apply_lora(model, lora_ext.LoraConfig("q_proj", r=2), "it")
    return randomized(model)


MODELS = {"peft": of_peft, "ours": of_ours}


def is_of_peft(model):
    return hasattr(model, "peft_config")


def logits_of(model, name, ids):
    """With one adapter of all samples, or none."""
    if not is_of_peft(model):
        lora_ext.set_adapter(model, name or [])
    elif name is None:
        with model.disable_adapter():
            return model(ids).logits
    else:
        model.base_model.set_adapter(name)
    return model(ids).logits


def train_all(model):
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_("lora_" in name)


def gradient_of(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, names):
    """Logits and gradients in a block."""
    train_all(model)
    y = blocks(model, names)
    y.backward(gradient_of(y))
    return y.detach(), gradients(model)


def alone(model, ids):
    """The same by each adapter on its own samples."""
    with torch.no_grad():
        y = torch.stack([logits_of(model, n, ids[[i]])[0] for i, n in enumerate(NAMES)])
    found = {}
    for name in filter(None, dict.fromkeys(NAMES)):
        own = [i for i, each in enumerate(NAMES) if each == name]
        if is_of_peft(model):
            model.base_model.set_adapter(name)
        train_all(model)
        logits_of(model, name, ids[own]).backward(gradient_of(y)[own])
        for key, value in gradients(model).items():
            found[key] = found.get(key, 0) + value
    return y, found


def blocks(model, names):
    with lora_ext.use_adapters(model, names):
        return model(some_ids(shape=(len(names), 4))).logits


def assert_as_alone(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    assert wanted[1].keys() <= found[1].keys()
    for name, value in found[1].items():
        expected = wanted[1].get(name, torch.zeros_like(value))
        limit = 1e-10 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(value, expected, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", MODELS)
def test_each_sample_as_with_its_adapter_alone(whose, kind):
    model = MODELS[whose](kind)
    found = step(model, NAMES)
    other = plain_copy(model) if whose == "peft" else model
    assert_as_alone(found, alone(other, some_ids(shape=(len(NAMES), 4))))


def test_pefts_adapter_names():
    model = of_peft("qwen3_moe").eval()
    ids = some_ids(shape=(len(NAMES), 4))
    names = [name or "__base__" for name in NAMES]
    with torch.no_grad():
        y = model(ids, adapter_names=names).logits
        with pytest.raises(ValueError, match="does not support mixed"):
            plain_copy(model)(ids, adapter_names=names)
        assert torch.equal(y, blocks(model, NAMES))
    torch.testing.assert_close(y, alone(plain_copy(model), ids)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("whose", MODELS)
def test_generation_and_beams(whose):
    model = MODELS[whose]("qwen3_moe").eval()
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    ids = some_ids(shape=(3, 5))
    names = ["de", None, "fr"]
    with lora_ext.use_adapters(model, names, repeats=2):
        found = model.generate(input_ids=ids, **words)
    for row, name in enumerate(names):
        with lora_ext.use_adapters(model, [name], repeats=2):
            own = model.generate(input_ids=ids[row : row + 1], **words)
        assert torch.equal(found[row], own[0])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_module_is_called_for_the_rows_of_each(is_compiled, monkeypatch):
    """In a traced program for all rows, of which its own are taken."""
    monkeypatch.setattr(rows_apart, "is_traced", lambda: is_compiled)
    x, index = torch.randn(2, 3, 4), torch.tensor([1, -1, -1, 1, 0, 1])
    seen, names = [], ["a", "b", "c"]

    def call(name, own):
        place = -1 if name is None else names.index(name)
        rows = own.flatten(0, -2)
        seen.append(len(rows))
        return rows * (place + 2), (rows[:, :1] + place,)

    y, (other,) = rows_apart.by_adapter(call, x, index, names)
    rows, place = x.flatten(0, 1), index[:, None]
    assert torch.equal(y, rows * (place + 2)) and torch.equal(other, rows[:, :1] + place)
    assert seen == ([6] * 4 if is_compiled else [2, 1, 3])
    with pytest.raises(ValueError, match=r"tensors of \d rows, as a router, but got \[4\]"):
        rows_apart.by_adapter(lambda name, rows: rows.sum(0), x[:, 0], index[:2], names)


@pytest.mark.parametrize("whose", MODELS)
def test_an_index_of_tokens(whose):
    """Tokens of one adapter are as those of a sample that has it."""
    model = MODELS[whose]("qwen3_moe").eval()
    ids = some_ids(shape=(2, 6))
    index = torch.zeros(2, 6, dtype=torch.int32)
    index[1] = 1
    with torch.no_grad():
        with lora_ext.use_adapters(model, ["fr", "de"], index):
            y = model(ids).logits
        with lora_ext.use_adapters(model, ["fr", "de"]):
            assert torch.equal(model(ids).logits, y)
        index[1, 3:] = -1  # causal: what comes before is as it was
        with lora_ext.use_adapters(model, ["fr", "de"], index):
            other = model(ids).logits
    torch.testing.assert_close(other[:, :3], y[:, :3], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(other[1, 3:], y[1, 3:])


# ---- adapters on experts alone: nothing else sees how many samples there are ----


def alone_on_experts(kind="plain", **words):
    adapters = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 1, "lora_alpha": 2}}
    return lora_ext.accelerate(experts_of_peft(kind, adapters, **words))


def of_rows(model, names, operands, index=None):
    with torch.no_grad(), lora_ext.use_adapters(model, names, index):
        return model(*operands)


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("names", [["x", "x"], ["x", None], ["y", "x"]])
def test_a_matrix_whose_module_keeps_the_samples(names, is_traced, monkeypatch):
    """As of a linear layer: y has the dimensions of x."""
    monkeypatch.setattr(rows_apart, "is_traced", lambda: is_traced)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config, "x")
    model.add_adapter("y", config)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    lora_ext.accelerate(randomized(model))
    with torch.no_grad():
        y = model(x, adapter_names=[name or "__base__" for name in names])
        assert y.shape == (2, 5, 3)
        for sample, name in enumerate(names):
            model.base_model.set_adapter(name or [])
            torch.testing.assert_close(y[sample], plain_copy(model)(x)[sample])


def test_rows_that_are_no_samples_are_refused():
    model = alone_on_experts()
    with pytest.raises(ValueError, match="expected x of shape"):
        of_rows(model, ["y", "x"], make_routes(5))
    with pytest.raises(ValueError, match="expected x of shape"):
        of_rows(model, ["y", "x"], make_routes(6), torch.zeros(2, 4, dtype=torch.int32))


@pytest.mark.parametrize("targets", [["experts"], ["mlp.gate"]], ids=["experts", "router"])
@pytest.mark.parametrize("whose", MODELS)
def test_a_packed_batch_or_one_of_more_samples_is_refused(whose, targets):
    """As linear layers refuse it, although experts and routers get rows without samples."""
    if whose == "ours":
        model = lora_ext.apply_lora(mixture(), lora_ext.LoraConfig(targets, r=2), "x")
    else:
        names = parameters_of("qwen3_moe")[:2] if targets == ["experts"] else ["mlp.gate.weight"]
        config = LoraConfig(r=2, target_modules=[], target_parameters=names)
        model = lora_ext.accelerate(get_peft_model(mixture(), config, "x"))
    with lora_ext.use_adapters(model, ["x", None]):
        model(some_ids(shape=(2, 8)))
        for shape in ((1, 8), (4, 2), (8, 1)):
            with pytest.raises(ValueError, match=r"expected x of shape \[2, tokens, in\]"):
                model(some_ids(shape=shape))


def test_an_index_of_tokens_of_repeated_samples():
    """Of a step after a prompt each sample has its last token's adapter."""
    model, step = alone_on_experts(), make_routes(6)
    wanted = of_rows(model, ["x", "x", "x", "y", "y", "y"], step)
    for width in (2, 4):
        index = torch.tensor([[1, 1, 1, 0][-width:], [0, 0, 0, 1][-width:]], dtype=torch.int32)
        block = lora_ext.use_adapters(model, ["x", "y"], index, repeats=3)
        with torch.no_grad(), block:
            model(*make_routes(6 * width))
            torch.testing.assert_close(model(*step), wanted, rtol=1e-10, atol=1e-10)
    same = lora_ext.use_adapters(model, ["x", "y"], torch.zeros(2, 3).int(), repeats=3)
    with same, pytest.raises(ValueError, match="6 may be 3 tokens of 2 samples, or one of each"):
        model(*step)


@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"]])
def test_one_parameter(names):
    """The outermost wrapper need not be that of an adapter's parameter."""
    model = alone_on_experts(names=names)
    operands = make_routes(4)
    y = of_rows(model, ["x"] * 4, operands)
    model.base_model.set_adapter("x")
    with torch.no_grad():
        torch.testing.assert_close(y, plain_copy(model)(*operands), rtol=1e-10, atol=1e-10)


def test_expert_dropout():
    """The mask is that of the token, whichever adapter it has."""
    model = alone_on_experts()
    lora_ext.accelerate(model, expert_dropout=0.5).train()
    operands = make_routes(6)
    torch.manual_seed(1)
    mixed = of_rows(model, ["x", "x", "y", "y", None, "y"], operands)
    torch.manual_seed(1)
    alone = of_rows(model, ["y"] * 6, operands)
    rows = [2, 3, 5]
    torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(alone, of_rows(model.eval(), ["y"] * 6, operands))


# ---- PEFT's verbs, and what is refused ----


def merged(model):
    model.merge_adapter(["x"])


def hooked(model):
    wrapper_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def trained(model):
    wrapper_of(model).get_base_layer().down_proj.requires_grad_(True)


def wrapper_of(model):
    return next(module for module in model.modules() if isinstance(module, ParamWrapper))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merged, r"\['x'\] are merged into the weight; call unmerge_adapter"),
        (hooked, "the experts have hooks; choose one adapter for the whole batch"),
    ],
)
@pytest.mark.parametrize("is_pefts", [False, True])
def test_what_needs_pefts_forward_is_refused(change, message, is_pefts):
    model = alone_on_experts()
    change(model)
    # PEFT's tests look for its words.
    words = "lora.ParamWrapper does not support mixed adapter batches yet. .*" if is_pefts else ""
    with pytest.raises(ValueError, match=f"{words}{message}"):
        if is_pefts:
            model(*make_routes(2), adapter_names=["x", "__base__"])
        else:
            of_rows(model, ["x", None], make_routes(2))


def test_trained_experts_are_refused():
    model = alone_on_experts()
    trained(model)
    with (
        pytest.raises(ValueError, match="the experts' weights are trained"),
        lora_ext.use_adapters(model, ["x", None]),
    ):
        model(*make_routes(2))


def test_names_and_verbs():
    model, operands = alone_on_experts(), make_routes(4)
    with pytest.raises(ValueError, match=r"expected names out of \['x', 'y'\]"):
        of_rows(model, ["z"] * 4, operands)
    with torch.no_grad(), lora_ext.use_adapters(model, ["y", "x", None, "x"]):
        y = model(*operands)
        paths = {(each.path, each.reason) for each in lora_ext.explain(model)}
        with model.disable_adapter():
            base = model(*operands)
        model.delete_adapter("y")
        with pytest.raises(RuntimeError, match="'y' was removed since"):
            model(*operands)
    what = f"{BY_PRODUCTS}, updates of down_proj, gate_up_proj"
    assert paths == {("fused", f"each row its own adapter, 2 in this batch: {what}")}
    torch.testing.assert_close(of_rows(model, [None] * 4, operands), base)
    torch.testing.assert_close(of_rows(model, ["x"] * 4, operands)[1], y[1])
    assert not hasattr(lora_ext.decelerate(model).base_model.model.experts, "row_adapters")


def test_our_experts_refuse_what_transformers_computes():
    model = of_ours("qwen3_moe")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    message = "LoRAQwen3MoeExperts needs transformers' own forward: the experts' weights are tr"
    with pytest.raises(ValueError, match=message):
        blocks(model, ["fr", "de"])
    with lora_ext.use_adapters(model, ["fr", "de"]):
        reasons = {each.reason for each in lora_ext.explain(model)}
    assert "the experts' weights are trained: rows with different adapters are refused" in reasons
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    model.model.layers[0].mlp.experts.lora["down_proj"].merge()
    with pytest.raises(RuntimeError, match="expected adapters that are not merged"):
        blocks(model, ["fr", "de"])


def test_explain_of_ours():
    model = of_ours("qwen3_moe")
    with lora_ext.use_adapters(model, ["fr", "it"]):
        paths = {each.name.rpartition(".")[2]: each.path for each in lora_ext.explain(model)}
    assert paths["down_proj"] == paths["q_proj"] == "fused" and paths["weight"] == "added"

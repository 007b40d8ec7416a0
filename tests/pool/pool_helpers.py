"""A pool with two adapters, what it computes, what it has to compute, and what it holds."""

import pytest
import torch
from adapter_helpers import LINEAR, make_ids, make_zoo
from helpers import F32, F64
from mixture_helpers import mixture

import lora_ext
from lora_ext import AdapterPool, LoraConfig

NAMES = ["a", "b", None]
LAYERS = ["layers.0.q_proj", "layers.0.mlp", "layers.1.q_proj", "layers.1.mlp"]
LAYERS += ["layers.2.q_proj", "layers.2.mlp", "c_attn"]


TARGETS = {"linear": LINEAR, "experts": ["experts"]}
each_kind = pytest.mark.parametrize("of", TARGETS)


def base_of(of, dtype):
    return make_zoo(dtype) if of == "linear" else mixture(dtype=dtype)


def make_pool(capacity=4, max_rank=6, dtype=F32, of="linear"):
    """A pool with "a" of rank 4 in all its layers, and "b" of rank 2 in some."""
    targets, some = TARGETS[of], {"linear": "q_proj", "experts": "experts.down_proj"}[of]
    pool = AdapterPool(base_of(of, dtype), capacity, max_rank, targets)
    pool.add_adapter("a", LoraConfig(targets, r=4, lora_alpha=6, lora_dropout=0.3))
    pool.add_adapter("b", LoraConfig([some], r=2, lora_alpha=-3, use_rslora=True))
    for seed, name in enumerate(pool):
        randomize(pool.parameters(name), seed)
    return pool


@torch.no_grad()
def randomize(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64))


def output(model):
    y = model(make_ids())
    return getattr(y, "logits", y)


def mixed(pool, names=NAMES):
    with lora_ext.use_adapters(pool.model, names):
        return output(pool.model)


def own_factors(model, name):
    """A model's factors of an adapter by the pool's keys."""
    return {
        key.removesuffix(f".{name}").replace(".lora.", "."): factor
        for key, factor in model.named_parameters()
        if key.endswith(f".{name}")
    }


@torch.no_grad()
def reference(pool, names=NAMES):
    """The same by a model with the pool's adapters as its own, one after the other."""
    rows = []
    for row, name in enumerate(names):
        of = "experts" if any("experts" in path for path in pool.layers) else "linear"
        model = base_of(of, next(pool.model.parameters()).dtype)
        specs = {} if name is None else pool.specs(name)
        for path, spec in specs.items():
            own = path.replace(".", "_")
            config = LoraConfig([path], spec.r, spec.lora_alpha, use_rslora=spec.use_rslora)
            lora_ext.apply_lora(model, config, own)
            for key, factor in own_factors(model, own).items():
                factor.copy_(pool.tensors(name)[key])
        if specs:
            lora_ext.set_adapter(model, [path.replace(".", "_") for path in specs])
        rows.append(output(model)[row])
    return torch.stack(rows)


def assert_close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def assert_served(pool, names=NAMES):
    """Both ways of a forward, from the parameters and from the whole pool, are the reference; in
    float64 they are one."""
    pool.model.eval()
    wanted = reference(pool, names)
    assert_close(mixed(pool, names).detach(), wanted)
    with torch.no_grad():
        assert_close(mixed(pool, names), wanted)


def values(pool, name):
    return {key: tensor.detach().clone() for key, tensor in pool.tensors(name).items()}


def buffers(pool):
    """All that layers hold."""
    return {
        f"{path}.{key}": tensor
        for path, layer in pool.layers.items()
        for key, tensor in layer.pool.named_buffers()
    }


def slots(pool):
    """Their values."""
    return {key: tensor.clone() for key, tensor in buffers(pool).items()}


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

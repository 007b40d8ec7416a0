"""A pool with two adapters, what it computes, what it has to compute, and what it holds."""

import torch
from adapter_helpers import LINEAR, make_ids, make_zoo
from helpers import F32, F64

import lora_ext
from lora_ext import AdapterPool, LoraConfig

NAMES = ["a", "b", None]
LAYERS = ["layers.0.q_proj", "layers.0.mlp", "layers.1.q_proj", "layers.1.mlp"]
LAYERS += ["layers.2.q_proj", "layers.2.mlp", "c_attn"]


def make_pool(capacity=4, max_rank=6, dtype=F32, **words):
    """A pool with "a" of rank 4 in all its layers, and "b" of rank 2 in some."""
    pool = AdapterPool(make_zoo(dtype), capacity, max_rank, LINEAR, **words)
    pool.add_adapter("a", LoraConfig(LINEAR, r=4, lora_alpha=6, lora_dropout=0.3))
    pool.add_adapter("b", LoraConfig(["q_proj"], r=2, lora_alpha=-3, use_rslora=True))
    for seed, name in enumerate(pool):
        randomize(pool.parameters(name), seed)
    return pool


@torch.no_grad()
def randomize(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64))


def mixed(pool, names=NAMES):
    with lora_ext.use_adapters(pool.model, names):
        return pool.model(make_ids())


def reference(pool, names=NAMES):
    """The same by a model with the pool's adapters as its own, one after the other."""
    rows = []
    for row, name in enumerate(names):
        model = make_zoo(next(pool.model.parameters()).dtype)
        for path, spec in ({} if name is None else pool.specs(name)).items():
            own = path.replace(".", "_")
            config = LoraConfig([f"re:{path}"], spec.r, spec.lora_alpha, use_rslora=spec.use_rslora)
            layer = lora_ext.apply_lora(model, config, own).get_submodule(path)
            layer.set_adapter(own)
            for table in ("lora_a", "lora_b"):
                getattr(layer, table)[own].data.copy_(pool.tensors(name)[f"{path}.{table}"])
        rows.append(model(make_ids())[row])
    return torch.stack(rows).detach()


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

"""Our own layers in two processes on the CPU, beyond `contract/test_distributed`: blocks, dtypes,
checkpointing, compiled blocks, and the state of sharded models.

What both compute is compared with the two halves of the batch in one process, whose gradients are
averaged: the same sums, so that the bits agree.
"""

import copy
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import two_processes
from adapter_helpers import EVERYTHING, Zoo, make_zoo
from helpers import BF16, F32
from layer_helpers import randomize
from step_helpers import under_autocast
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    WORLD,
    assert_near,
    assert_trained_alike,
    gradients_of,
    half,
    in_bfloat16,
    values_of,
    whole,
)

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.models import lora_layers, lora_state_dict
from lora_ext.nn import AdapterSpec

case, test_two_processes = two_processes.cases(__name__)
BOTH = range(WORLD)


LAYERS = (*EVERYTHING, "head.0")
LINEAR = ("q_proj", "mlp", "head.0")


def make_net(dtype=F32, second=False, targets=LAYERS, **options):
    """The same in every process: an adapter in each layer, and another one if asked for."""
    net = make_zoo(dtype).train()
    apply_lora(net, LoraConfig(targets, r=3, lora_alpha=6, **options))
    if second:
        apply_lora(net, LoraConfig(targets, r=2, lora_alpha=2, **options), "second")
    return randomize(net)


def batches(steps=2):
    """Of token ids, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(11, (steps, 8, 5), generator=generator)


def train(net, ranks, steps=2, forward=None, seeds=None):
    optimizer = torch.optim.AdamW(lora_ext.models.lora_plus_groups(net, 0.01))
    return two_processes.train(net, batches(steps), ranks, forward, optimizer, seeds)


def assert_raises(kind, text, function):
    with pytest.raises(kind, match=text):
        function()


# ---- DistributedDataParallel ----


@case
def ddp_trains_as_one_process(rank):
    for options in ({}, {"init_lora_weights": "pissa", "targets": LINEAR}, {"bias": "all"}):
        net, alone = make_net(**options), make_net(**options)
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
        gradients = train(net, [rank], 3, wrapped)
        assert_trained_alike(net, gradients, alone, train(alone, BOTH, 3))


def checkpointed(net):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for number, block in enumerate(net.layers):
        net.layers[number] = checkpoint_wrapper(block)
    return net


def compiled(net):
    for block in net.layers:
        block.compile(backend="aot_eager")
    return net


# ---- FSDP2 ----


def shard(net, layers=False, **options):
    """By blocks, or by layers, and the root."""
    parts = [layer for _, layer in lora_layers(net)] if layers else net.layers
    return two_processes.shard(net, parts, **options)


@case
def fsdp_trains_as_one_process(rank):
    """By blocks and by layers; bfloat16 weights stay frozen beside float32 factors."""
    by_blocks, by_layers = False, True
    for layers, options in (
        (by_blocks, {"dtype": BF16}),
        (by_layers, {"dtype": BF16}),
        (by_blocks, {"dtype": BF16, "targets": LINEAR, "lora_bias": True}),
        (by_layers, {"targets": LINEAR, "lora_bias": True}),
        (by_blocks, {"targets": LINEAR, "init_lora_weights": "pissa"}),
        (by_layers, {"targets": LINEAR, "init_lora_weights": "pissa"}),
        (by_layers, {"bias": "all"}),
    ):
        net, alone = make_net(**options), make_net(**options)
        frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
        shard(net, layers)
        gradients = train(net, [rank], 2)
        assert_trained_alike(net, gradients, alone, train(alone, BOTH, 2))
        assert all(value.dtype == F32 for value in gradients.values())
        for name, value in values_of(net).items():
            assert name not in frozen or torch.equal(value, frozen[name]), name


@case
def fsdp_stores_the_weight_of_transposed_layers(rank):
    """fan_in_fan_out and PiSSA hand views and copies of gathered parameters to autograd."""

    def make():
        torch.manual_seed(0)
        first = lora_ext.LoRALinear(16, 24, r=2, fan_in_fan_out=True)
        second = lora_ext.LoRALinear(24, 8, r=2, init_lora_weights="olora")
        net = nn.Sequential(nn.Embedding(11, 16).requires_grad_(False), first, second)
        for layer in (first, second):
            nn.init.normal_(layer.lora_b["default"])
            layer.bias.requires_grad_(False)
        return net

    net, alone = make(), make()
    two_processes.shard(net, net[1:])
    gradients = train(net, [rank], 2)
    assert_trained_alike(net, gradients, alone, train(alone, BOTH, 2))


@case
def fsdp_mixed_precision(rank):
    """Its policy casts weights and factors to bfloat16: the gradients of such a model, averaged in
    float32."""
    net, half_net = make_net(), make_net()
    shard(net, **in_bfloat16(cast_forward_inputs=False))
    half_net.to(BF16)
    gradients = train(net, [rank], 1)
    halves = []
    for one in BOTH:
        half_net.zero_grad()
        half_net(half(batches(1)[0], one)).float().square().mean().backward()
        halves.append({name: value.float() for name, value in gradients_of(half_net).items()})
    expected = {name: (value + halves[1][name]) / WORLD for name, value in halves[0].items()}
    assert all(value.dtype == F32 for value in gradients.values())
    assert_near(gradients, expected)


@case
def fsdp_under_autocast(rank):
    net, alone = make_net(), make_net()
    shard(net)

    gradients = train(net, [rank], 1, under_autocast(net, "cpu"))
    assert_near(gradients, train(alone, BOTH, 1, under_autocast(alone, "cpu")))


@case
def dropout_with_checkpointing_and_compile(rank):
    """Each process draws its own masks; the recomputation draws them again, and gathers the
    parameters."""
    seeds = [11, 12]
    alone = make_net(lora_dropout=0.4)
    expected = train(alone, BOTH, 2, seeds=seeds)
    other = train(make_net(lora_dropout=0.4), BOTH, 2, seeds=[11, 13])
    assert any(not torch.equal(value, other[name]) for name, value in expected.items())
    for wrap in (checkpointed, compiled):
        for way in (DistributedDataParallel, shard):
            net = wrap(make_net(lora_dropout=0.4))
            gradients = train(net, [rank], 2, way(net), seeds=seeds)
            assert_trained_alike(net, gradients, alone, expected)


# ---- state of sharded models ----


@case
def state_dicts_of_shards(rank):
    """The keys of the plain model; whole tensors are its values; they load into it and back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    words = {"modules_to_save": ("layers.1.q_proj",), "targets": ("emb", "head.0")}
    plain = make_net(second=True, **words)
    for net in (shard(copy.deepcopy(plain)), shard(checkpointed(copy.deepcopy(plain)))):
        whole_state = {key: whole(value) for key, value in net.state_dict().items()}
        assert_near(whole_state, dict(plain.state_dict()))
        for options in ({}, {"adapter_name": "second"}, {"bias": "lora_only"}, {"bias": "all"}):
            ours = {k: whole(v) for k, v in lora_state_dict(net, **options).items()}
            assert_near(ours, lora_state_dict(plain, **options))
        full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        loaded = make_net(
            second=True, modules_to_save=("layers.1.q_proj",), targets=("emb", "head.0")
        )
        nn.init.normal_(loaded.head[0].weight)
        loaded.load_state_dict(full)
        assert_near(dict(loaded.state_dict()), dict(plain.state_dict()))
        other = {key: value + 1 for key, value in full.items()}
        set_model_state_dict(net, dict(other), options=StateDictOptions(full_state_dict=True))
        assert_near(
            {k: whole(v) for k, v in lora_state_dict(net).items()},
            {key: value + 1 for key, value in lora_state_dict(plain).items()},
        )
        loaded.load_state_dict(other)
        ids = half(batches(1)[0], rank)
        torch.testing.assert_close(net(ids), loaded(ids))


@case
def shards_made_on_the_meta_device(rank):
    """Adapters added, then sharded, before any value exists."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    plain = make_net()
    with torch.device("meta"):
        net = apply_lora(Zoo(), LoraConfig(LAYERS, r=3, lora_alpha=6))
    shard(net)
    net.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, plain.state_dict() if rank == 0 else {}, options=options)
    gradients = train(net, [rank], 2)
    assert_trained_alike(net, gradients, plain, train(plain, BOTH, 2))


@case
def adapters_saved_from_shards(rank):
    """After an evaluation too, which leaves the root's parameters gathered and rounded."""
    from safetensors.torch import load_file

    from lora_ext.adapters import AdapterError, load_adapter, save_adapter

    plain = make_net()
    if rank == 0:
        save_adapter(plain, "plain")
    for net in (
        shard(make_net(), **in_bfloat16(cast_forward_inputs=False)),
        shard(checkpointed(make_net())),
        checkpointed(make_net()) if rank == 0 else None,
    ):
        if net is None:
            continue
        with torch.no_grad():
            net(half(batches(1)[0], rank))
        save_adapter(net, "ours")
        if rank == 0:
            files = [
                load_file(f"{folder}/adapter_model.safetensors") for folder in ("plain", "ours")
            ]
            assert_near(*files)
    dist.barrier()
    # A file in the folder's place: rank 0 fails, and the other hears of it.
    onto = partial(save_adapter, shard(make_net()), "plain/README.md")
    assert_raises(AdapterError, "README", onto)
    other = checkpointed(make_net())
    load_adapter(other, "plain", "loaded")
    for key, value in lora_state_dict(other, adapter_name="loaded").items():
        assert torch.equal(value, lora_state_dict(plain)[key.replace("loaded", "default")]), key


@case
def what_needs_whole_weights_is_refused(rank):
    """Before a forward and after one, which gathers the root's parameters and keeps them."""
    ids = half(batches(1)[0], rank)
    expected = make_net(second=True)(ids)
    more = LoraConfig(LAYERS, r=2)
    for net in (shard(make_net(second=True)), shard(make_net(second=True), layers=True)):
        for _ in range(2):
            merging = partial(assert_raises, RuntimeError, "merge: .*sharded .*before fully_shard")
            merging(partial(lora_ext.merge_adapter, net))
            merging(partial(lora_ext.merge_and_unload, net))
            merging(net.layers[0].q_proj.merge)
            refused = partial(assert_raises, RuntimeError, "expected a whole weight, but")
            refused(partial(lora_ext.unload, net))
            refused(partial(apply_lora, net, more, "third"))
            refused(partial(net.layers[0].q_proj.add_adapter, "third", AdapterSpec(2, 2.0)))
            refused(partial(net.layers[0].q_proj.delete_adapter, "second"))
            refused(partial(lora_ext.delete_adapter, net, "second"))
            assert all(not layer.merged for _, layer in lora_layers(net))
            assert {tuple(layer.adapters) for _, layer in lora_layers(net)} == {
                ("default", "second")
            }
            with torch.no_grad():
                torch.testing.assert_close(net(ids), expected)


@case
def merged_and_then_sharded(rank):
    """The other way around: the merged weight is a whole copy in each process, used as it is."""
    net, plain = make_net().eval(), make_net().eval()
    lora_ext.merge_adapter(net)
    ids = half(batches(1)[0], rank)
    with torch.no_grad():
        torch.testing.assert_close(shard(net)(ids), plain(ids), rtol=1e-5, atol=1e-5)


@case
def packs_are_not_used_and_not_kept_after_sharding(rank):
    """A pack holds the whole weight, and would hide that a shard was loaded."""
    net, plain = make_net(), make_net()
    layers = [net.layers[0].q_proj, net.layers[1].mlp, net.head[0]]
    for layer in layers:
        assert layer.pack_weight().is_packed
    weights = [weakref.ref(layer.weight) for layer in layers]
    shard(net)
    assert {row.path for row in lora_ext.explain(net, 100)} <= {"fused", "added"}
    for one in (net, plain):
        state = {key: torch.ones_like(value) for key, value in one.state_dict().items()}
        one.load_state_dict(state)
    ids = half(batches(1)[0], rank)
    torch.testing.assert_close(net(ids), plain(ids))
    assert all(layer.packed is None for layer in layers)
    assert all(weight() is None for weight in weights)

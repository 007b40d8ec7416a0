"""Adapters on disk of models that are compiled, sharded or on the meta device."""

import copy

import pytest
import torch
from adapter_helpers import (
    EVERYTHING,
    LINEAR,
    make_zoo,
    peft_model,
    randomize,
    read_tensors,
    save_peft,
)

from lora_ext import LoraConfig, apply_lora
from lora_ext.adapters import AdapterError, load_adapter, save_adapter


def test_a_compiled_model(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path / "theirs")
    model = torch.compile(copy.deepcopy(base), backend="eager")
    assert load_adapter(model, tmp_path / "theirs") is model
    save_adapter(model, tmp_path / "ours")
    ours = read_tensors(tmp_path / "ours")
    theirs = read_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def one_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_are_gathered(one_rank, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = apply_lora(
        make_zoo(torch.float32), LoraConfig(EVERYTHING, r=2, modules_to_save="norm", bias="all")
    )
    pissa = apply_lora(make_zoo(torch.float32), LoraConfig(LINEAR, r=2, init_lora_weights="pissa"))
    for number, one in enumerate((model, pissa)):
        randomize(p for p in one.parameters() if p.requires_grad)
        save_adapter(one, tmp_path / f"whole{number}")
        for layer in one.layers:
            fully_shard(layer, mesh=one_rank)
        fully_shard(one, mesh=one_rank)
        save_adapter(one, tmp_path / f"sharded{number}")
        whole, sharded = (read_tensors(tmp_path / f"{n}{number}") for n in ("whole", "sharded"))
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    with pytest.raises(AdapterError, match="it is sharded; load adapters after the weights"):
        load_adapter(model, tmp_path / "whole0", "other")


def test_a_model_without_values(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path)
    with pytest.raises(AdapterError, match=r"the weight of 'layers.0.q_proj'.*on the meta device"):
        load_adapter(base.to("meta"), tmp_path)

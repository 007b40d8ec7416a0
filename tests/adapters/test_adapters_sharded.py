"""Adapters on disk of models that are compiled, sharded or on the meta device."""

import copy
import os

import pytest
import torch
from adapter_helpers import (
    EVERYTHING,
    LINEAR,
    make_zoo,
    output,
    peft_model,
    randomize,
    read_config,
    read_tensors,
    save_peft,
)

from lora_ext import LoRAConfig, apply_lora
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
        make_zoo(torch.float32), LoRAConfig(EVERYTHING, r=2, modules_to_save="norm", bias="all")
    )
    pissa = apply_lora(make_zoo(torch.float32), LoRAConfig(LINEAR, r=2, init="pissa"))
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


def save_on_one_of_two_ranks(rank, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    config = LoRAConfig(EVERYTHING, r=3, modules_to_save="norm", bias="all")
    model = apply_lora(make_zoo(torch.float32), config)
    randomize(p for p in model.parameters() if p.requires_grad)
    if rank == 0:
        save_adapter(model, f"{folder}/whole")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    output(model)  # leaves the root's parameters gathered
    save_adapter(model, f"{folder}/sharded")
    error = FileExistsError if rank == 0 else AdapterError
    with pytest.raises(error, match=f"{folder}/store"):
        save_adapter(model, f"{folder}/store")  # a file: rank 0 fails, and the other hears of it
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may be alive, and would abort an orderly exit


@pytest.mark.slow
def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(save_on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    whole, sharded = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    assert read_config(tmp_path / "whole") == read_config(tmp_path / "sharded")


def test_a_model_without_values(tmp_path):
    base = make_zoo()
    save_peft(peft_model(base, target_modules=LINEAR), tmp_path)
    with pytest.raises(AdapterError, match=r"the weight of 'layers.0.q_proj'.*on the meta device"):
        load_adapter(base.to("meta"), tmp_path)

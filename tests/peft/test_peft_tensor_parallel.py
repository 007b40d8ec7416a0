"""transformers' tensor parallelism in two processes on the CPU: base and adapters as DTensors,
which PEFT's forward sums, accelerated or not."""

import pytest
import torch
import torch.distributed as dist
import two_processes
from helpers import F32
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import randomize, tiny_llama
from two_processes import gradients_of

import lora_ext

distributed = pytest.importorskip("transformers.distributed")
case, test_two_processes = two_processes.cases(__name__)

# Those whose outputs are split. Where inputs are, PEFT 0.21.2 gives lora_A its half as the whole
# width, which transformers 5.24 splits again: it fails without us, too.
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
SHARDED = "the adapters are sharded for tensor parallelism"


def parallel_llama(rank):
    """The tiny model, each process with its half of the layers."""
    if rank == 0:
        tiny_llama().save_pretrained("base")
    dist.barrier()
    config = distributed.DistributedConfig(tp_size=two_processes.WORLD)
    kind = type(tiny_llama())
    return kind.from_pretrained("base", distributed_config=config, dtype=F32)


def step(model, ids):
    """(logits, gradients by name)."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits.detach(), gradients_of(model)


@case
def an_adapter_over_two_processes(rank):
    """The numbers of plain PEFT in one process; PEFT's own forward, and `explain` says why."""
    plain = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS)))
    if rank == 0:
        plain.save_pretrained("adapter")
    dist.barrier()
    ids = torch.arange(16).view(2, 8)
    model = PeftModel.from_pretrained(parallel_llama(rank), "adapter", is_trainable=True)
    wanted, theirs = step(plain, ids), step(model, ids)
    lora_ext.accelerate(model)
    assert {(layer.path, layer.reason) for layer in lora_ext.explain(model)} == {("peft", SHARDED)}
    logits, gradients = step(model, ids)
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-5)
    assert set(gradients) == set(wanted[1])
    torch.testing.assert_close(gradients, wanted[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((logits, gradients), theirs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted[0], rtol=1e-4, atol=1e-5)
        with lora_ext.use_adapters(model, ["default", None]), plain.disable_adapter():
            mixed = torch.stack([wanted[0][0], plain(input_ids=ids).logits[1]])
            torch.testing.assert_close(model(input_ids=ids).logits, mixed, rtol=1e-4, atol=1e-5)

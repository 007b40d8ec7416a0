"""Both kinds of layer under DeepSpeed's ZeRO in two processes on the CPU, beside one process."""

import importlib.util
import os

import pytest
import torch
import two_processes
from two_processes import WORLD, CallsOfOps, assert_near, half

import lora_ext
from contract.test_distributed import NEAR_PEFT, STEPS, alike, train_alone, values
from lora_ext.peft.reasons import HOOKED

case, test_two_processes = two_processes.cases(__name__)
without = importlib.util.find_spec("deepspeed") is None
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(without, reason="deepspeed is not installed"),
]


def started(rank):
    """deepspeed, on the group that is there."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed


def train(deepspeed, subject, stage, rank):
    """Steps on the rank's part of each batch; how often the op was called."""
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=subject.model,
        optimizer=torch.optim.SGD(trained, 0.05),
        config={
            "train_micro_batch_size_per_gpu": 8 // WORLD,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        },
        dist_init_required=False,
    )
    if stage == 3:
        found = {(layer.path, layer.reason) for layer in lora_ext.explain(subject.model)}
        assert ("peft", HOOKED) in found and "fused" not in {path for path, _ in found}
    with CallsOfOps() as calls:
        for batch in subject.x(8 * STEPS).chunk(STEPS):
            engine.backward(engine(half(batch, rank)).square().mean())
            engine.step()
    return calls.of["lora"]


@case
def zero_trains_as_one_process(rank):
    """By the op where it computes in one process, at stages 0 to 2. At 3, which gathers a factor
    where it is called, PEFT's layers take PEFT's forward, and ours are not for it."""
    deepspeed = started(rank)
    for stage in range(4):
        for subject, alone in alike("one", "three", *(["dora"] if stage < 3 else [])):
            if stage == 3 and subject.kind.name != "peft":
                continue
            fused = [layer.path for layer in lora_ext.explain(subject.model)].count("fused")
            calls = STEPS * fused if stage < 3 else 0
            assert train(deepspeed, subject, stage, rank) == calls, stage
            train_alone(alone)
            parameters = list(subject.model.parameters()) if stage == 3 else []
            with deepspeed.zero.GatheredParameters(parameters):
                assert_near(values(subject), values(alone), 1e-5 if stage < 3 else NEAR_PEFT)

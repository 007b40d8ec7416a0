"""Cases that run in two processes on the CPU, joined by gloo; training there beside one process.

The processes start once and run all cases of a test module; a case that fails or hangs in one of
them fails alone.
"""

import datetime
import importlib
import json
import os
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

WORLD = 2
# Of one collective, and from the end of one case to that of the next, the first with all imports: a
# deadlock fails instead of hanging, and a busy machine may take its time.
COLLECTIVE_SECONDS, CASE_SECONDS = 30, 120

# module -> {name: function of the rank}; filled where a module is imported, in each process.
CASES = {}


def cases(module):
    """What a test module of cases begins with: `case, test_two_processes = cases(__name__)`.

    Returns:
        A decorator of cases, functions that run in both processes with the rank as argument; and
        the test that has one item for each of them.
    """
    found = CASES[module] = {}

    def case(function):
        found[function.__name__] = function
        return function

    @pytest.mark.parametrize("name", found)
    def test_two_processes(outcomes, name):
        failures = [text for text in outcomes[name] if not text.endswith(": ok")]
        assert not failures, "\n".join(failures)

    return case, test_two_processes


def half(ids, rank):
    """The rank's part of a batch."""
    return ids.chunk(WORLD)[rank]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain_name(name):
    """Without what checkpointing and compilation put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def gradients_of(model):
    """Name -> gradient of the trained, whole."""
    return {
        plain_name(name): whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def train(model, batches, ranks, forward=None, optimizer=None, seeds=None):
    """Steps on the parts of these ranks, averaged; name -> gradient of the last one.

    Args:
        forward: what computes, such as the model in DistributedDataParallel.
        seeds: rank -> seed of that process's dropout.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, 0.05)
    for batch in batches:
        optimizer.zero_grad()
        for rank in ranks:
            torch.manual_seed(seeds[rank] if seeds else 0)
            y = (forward or model)(half(batch, rank))
            (y.float().square().mean() / len(ranks)).backward()
        optimizer.step()
    return gradients_of(model)


def values_of(model, names=None):
    """Name -> parameter, whole; of all, or of these."""
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: whole(named[name]).detach().clone() for name in (names or named)}


def assert_near(found, wanted, tolerance=0.0):
    """The same names in the same order; values within a share of the largest of the wanted ones."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        limit = tolerance * value.abs().max()
        assert found[name].dtype == value.dtype, name
        assert ((found[name] - value).abs() <= limit).all(), name


def assert_trained_alike(model, gradients, alone, expected, tolerance=0.0, names=None):
    """The gradients of one process in the last step, and its parameters after it, or these."""
    trained = [plain_name(name) for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(gradients) == sorted(trained)
    assert all(value.abs().max() > 0 for value in expected.values())
    assert_near(gradients, expected, tolerance)
    assert_near(values_of(model, names), values_of(alone, names), tolerance)


def shard(model, parts=(), **options):
    """The parts and the model: parameters become DTensors on both processes."""
    from torch.distributed.fsdp import fully_shard

    for part in parts:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def in_bfloat16(**options):
    """Of FSDP2: parameters in bfloat16, reductions in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    return {"mp_policy": MixedPrecisionPolicy(**types, **options)}


class CallsOfOps(TorchFunctionMode):
    """Counts what Python calls of lora_ext's ops: `with CallsOfOps() as calls`, then
    `calls.of["lora"]`.

    Not by torch's profiler, which also records the collectives, in gloo's threads: its end does not
    wait for them, and a process with torch 2.13 was seen to crash in one (SIGSEGV in malloc).
    """

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        namespace, _, name = str(func).partition(".")
        if namespace == "lora_ext":
            self.of[name.removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def run(module, folder):
    """Runs the module's cases in both processes.

    Returns:
        case -> a report of each process: "rank 0: ok", or its traceback.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    names = list(CASES[module])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        context = mp.spawn(_run_cases, (module, str(folder), names), nprocs=WORLD, join=False)
    reports = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    unfinished = "the process did not come to its end"
    deadline, seen = 0.0, None
    try:
        while not context.join(timeout=0.2):
            sizes = [path.stat().st_size if path.exists() else 0 for path in reports]
            if sizes != seen:
                deadline, seen = time.monotonic() + CASE_SECONDS, sizes
            if time.monotonic() > deadline:
                break
    except mp.ProcessExitedException as error:
        unfinished = f"{unfinished}: {error}"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    found = [json.loads(path.read_text()) if path.exists() else {} for path in reports]
    return {
        name: [f"rank {rank}: {report.get(name, unfinished)}" for rank, report in enumerate(found)]
        for name in names
    }


def _run_cases(rank, module, folder, names):
    torch.set_num_threads(1)
    importlib.import_module(module)
    found = CASES[module]
    folder = Path(folder)
    store = dist.FileStore(str(folder / "store"), WORLD)
    report = {}
    connected = False
    for name in names:
        if not connected:
            _start_group(rank, folder / f"group_{name}")
        try:
            case_folder = folder / name
            case_folder.mkdir(exist_ok=True)
            os.chdir(case_folder)
            torch.manual_seed(0)
            found[name](rank)
            report[name] = "ok"
        except BaseException:
            report[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
        # A process that failed may have left the other in a collective: both connect anew.
        store.set(f"{name}/{rank}", report[name])
        connected = all(store.get(f"{name}/{one}") == b"ok" for one in range(WORLD))
        if not connected:
            dist.destroy_process_group()
    if connected:
        dist.destroy_process_group()
    # Without the interpreter's end: there Python (3.11) ends a thread of torch's that asks for the
    # GIL by unwinding it, and the process aborts ("terminate called without an active exception").
    os._exit(0)


def _start_group(rank, path):
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD, timeout=timeout
    )

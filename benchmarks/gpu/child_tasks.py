"""The child that measures: `python -m benchmarks.gpu.child_tasks TASK DEVICE`.

It says that it is ready, reads an item, a line of JSON, computes, answers with a line of JSON, and
so on until its input ends. What else it or a library prints is only kept. After each item it asks
whether the device still works: a fault stays with a process, and every later result would be an
error, so that the parent (children.py) goes on with a new child.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .child import MARK

_ERROR_LENGTH = 300

# Packages that stages use where they are installed.
USED = ("pytest", "hypothesis", "numpy", "peft", "loralib", "transformers", "safetensors")

Fields = dict[str, Any]


def _device(fields: Fields, device: str) -> Fields:
    """What the results are of; "reason" where the device cannot be used."""
    from ..machine import describe, missing_device

    reason = missing_device(device)
    if reason:
        return {"reason": reason}
    absent = [name for name in USED if importlib.util.find_spec(name) is None]
    return {"machine": describe(device, fields["machine"]), "absent": absent}


def _ceilings(fields: Fields, device: str) -> Fields:
    from .ceilings import ceilings

    return ceilings(device)


def _cell(fields: Fields, device: str) -> Fields:
    from .. import runner
    from ..shapes import Cell
    from ..timing import Plan

    cell = Cell(**fields["cell"])
    return {"entry": runner.run_cell(cell, Plan(**fields["plan"]), announce=_announce)}


def _adapters(fields: Fields, device: str) -> Fields:
    from ..adapters.cases import Case
    from ..adapters.measure import measure
    from ..timing import Plan

    case = Case(**fields["case"])
    return {"entry": measure(case, Plan(**fields["plan"]), announce=_announce)}


def _mixtures(fields: Fields, device: str) -> Fields:
    from ..timing import Plan
    from .mixture_ways import measure
    from .mixtures import Mixture

    mixture = Mixture(**fields["case"])
    return {"entry": measure(mixture, Plan(**fields["plan"]), announce=_announce)}


def _profile(fields: Fields, device: str) -> Fields:
    from ..shapes import Cell
    from .profile import kernels_of

    return {"kernels": kernels_of(Cell(**fields["cell"]), fields["variant"])}


def _all_kernels() -> list[Any]:
    from lora_ext.device import indexed
    from lora_ext.kernels.kernel_checks import every_kernel

    return every_kernel(indexed(None))


def _kernels(fields: Fields, device: str) -> Fields:
    """The names of all kernels that the card can be asked for."""
    return {"names": [each.name for each in _all_kernels()]}


def _check(fields: Fields, device: str) -> Fields:
    """Why one kernel failed its check; here, since this process is made to be lost."""
    from lora_ext.kernels.kernel_checks import check_kernels

    chosen = [each for each in _all_kernels() if each.name == fields["name"]]
    return {"failed": check_kernels(kernels=chosen, isolated=False).get(fields["name"], "")}


def _tune(fields: Fields, device: str) -> Fields:
    import torch

    import lora_ext
    from lora_ext.autotune import Shape, read_cache

    path, shape = Path(fields["folder"]) / "autotune.json", Shape(**fields["shape"])
    layer = lora_ext.LoRALinear(
        shape.in_features,
        shape.out_features,
        device="meta",  # sizes alone
        dtype=torch.bfloat16,
        r=shape.rank,
        lora_dropout=0.05 if shape.dropout else 0.0,
        adapter_dtype=torch.float32 if shape.float_adapters else torch.bfloat16,
    )
    found = lora_ext.warmup(layer, shape.rows, cache=path)
    if found.note:
        raise RuntimeError(found.note)
    entries = read_cache(path).entries
    won = [entry for entry in entries if entry.route != "library"]
    return {"entries": len(entries), "not_library": len(won)}


TASKS: dict[str, Callable[[Fields, str], Fields]] = {
    "device": _device,
    "ceilings": _ceilings,
    "cell": _cell,
    "adapters": _adapters,
    "mixtures": _mixtures,
    "profile": _profile,
    "kernels": _kernels,
    "check": _check,
    "tune": _tune,
}


def _announce(what: str) -> None:
    """Says what is about to run."""
    print(f"  {what}", flush=True)


def _text(error: BaseException) -> str:
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}"[:_ERROR_LENGTH]


def fault_of(device: str) -> str:
    """What is wrong with the device since something failed on it; empty if it works."""
    if device != "cuda":
        return ""
    import torch

    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except Exception as error:
        return _text(error)
    return ""


def answers(task: str, device: str, lines: Iterator[str]) -> Iterator[Fields]:
    """An answer to each line; after a device's fault, the last one says so."""
    yield {"ready": True}
    for line in lines:
        answer: Fields = {}
        try:
            result = TASKS[task](json.loads(line), device)
            json.dumps(result, allow_nan=False)
            answer["result"] = result
        except Exception as error:
            answer["error"] = _text(error)
        fault = fault_of(device)
        if fault:
            yield {**answer, "fault": fault}
            return
        yield answer


def main(arguments: list[str]) -> None:
    """Never returns to what a faulty device would make of an orderly end."""
    task, device = arguments
    for answer in answers(task, device, iter(sys.stdin.readline, "")):
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

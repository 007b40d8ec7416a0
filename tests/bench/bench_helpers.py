"""Cells, results and runs that the tests of the benchmarks share."""

import time
from pathlib import Path

import torch

from benchmarks import shapes
from benchmarks.gpu import cases, cells, mixtures, quantized
from benchmarks.timing import Plan

QUICK = Plan(min_rounds=3, max_rounds=3, seconds=0.0, batch_ms=0.1, max_wait=1.0, warmup_ms=0.1)

MACHINE = {
    "name": "a machine",
    "device": "cpu",
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "memory_gib": 8.0,
    "gpu": None,
    "os": "Linux x86_64",
    "versions": {"torch": torch.__version__},
    "lora_ext": {"version": "0"},
    "torch_cpu_capability": "AVX2",
    "date": "2000-01-01T00:00:00+00:00",
    "disturbance_source": "none",
}


def small(mode=shapes.STEP, dtype="float32", **fields):
    return shapes.Cell(mode, dtype, 5, 24, 32, rank=4, **fields)


def summary(ms, **fields):
    """Of five rounds that took the same time."""
    kept = {"n": 5, "dropped": 0, "disturbed": False, "inner": 1, "samples": [ms] * 5}
    return {"ms": ms, "p25": ms, "p75": ms, **kept, **fields}


def synthetic(cell, times, peaks=None):
    """A result in which every round takes the same time: ms of each variant."""
    timing = {name: summary(ms) for name, ms in times.items()}
    peaks = peaks or dict.fromkeys(times, 1 << 20)
    taken = {name: {"peak": peak, "saved": 0} for name, peak in peaks.items()}
    return {
        "cell": cell.as_dict(),
        "status": "ok",
        "errors": {},
        "notes": {},
        "timing": timing,
        "memory": taken,
    }


def synthetic_case(case, times):
    """The same of a batch of many adapters."""
    timing = synthetic(small(), times)["timing"]
    row = {"case": case.as_dict(), "status": "ok", "errors": {}, "notes": {}, "disagreements": {}}
    return row | {"timing": timing}


def measured_run():
    """A run on an H100 that never was, for the report: stage -> rows."""
    times = {"merged": 1.0, "frozen": 1.0, "ours": 1.1, "ours_kernel": 1.5, "peft_default": 2.2}
    replays = {name: 0.9 * ms for name, ms in times.items()}
    entries = {"headline": [], "adapters": [], "quantized": [], "mixtures": []}
    for cell in [c for c in cells.headline_cells() if c.group == "model"]:
        entry = synthetic(cell, times)
        entries["headline"].append(entry | {"graph": synthetic(cell, replays)["timing"]})
    times = {"merged": 1.0, "frozen": 1.0, "ours": 1.08, "ours_offs": 1.04, "peft": 9.0}
    entries["adapters"] = [synthetic_case(case, times) for case in cases.many_cases()]
    times = {"dense": 1.0, "ours": 1.1}
    entries["quantized"] = [synthetic_case(one, times) for one in quantized.quantized_cases()]
    times = {"frozen": 1.0, "ours": 1.1, "ours_fp32": 1.2}
    entries["mixtures"] = [synthetic_case(each, times) for each in mixtures.mixtures()]
    ended = {"": {"name": "", "status": "done", "seconds": 1.0, "summary": ""}}
    return {
        stage: ended | {str(n): {"name": str(n), "status": "ok", "entry": e} for n, e in pairs}
        for stage, pairs in ((stage, enumerate(found)) for stage, found in entries.items())
    }


def is_alive(pid: int) -> bool:
    """A zombie that nobody has waited for yet is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def dies(pid: int) -> bool:
    until = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_alive(pid)

"""The benchmark of whole models: what gets adapters, what is compared, what the report says."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from bench_helpers import summary
from helpers import packable
from peft_helpers import net
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext
from benchmarks.whole_models import generate, mixed_batch, models_report, packed
from benchmarks.whole_models.cases import BATCH, LENGTH, Case, base_model
from benchmarks.whole_models.overhead import overheads
from benchmarks.whole_models.step import VARIANTS, adapted, check_fused, forward_of, step_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MiniLM", "GPT-2"])
def test_variants_have_the_same_adapters(name):
    """PEFT's four have equal parameters; the accelerated ones have all layers on the op."""
    case = Case(name, "attention")
    base = base_model(case)
    x = torch.randn(1, 4, base.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    pairs = [(x, torch.randn_like(x))]
    for variant in VARIANTS:
        model = adapted(case, base, variant)
        step_of(model, pairs)()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert bool(grads) == (variant != "frozen")
        assert all(grad is not None for grad in grads)
        forward_of(model, pairs)()
        assert model.training
        kinds = {layer.path for layer in lora_ext.explain(model)}
        if variant.startswith("peft"):
            assert kinds <= ({"fused", "library"} if "accelerated" in variant else {"peft"})
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        wide = variant in ("ours_fp32", "peft_default", "peft_default_accelerated")
        if variant != "frozen":
            assert dtypes == {torch.float32 if wide else torch.bfloat16}


def test_what_is_not_on_the_op_is_not_measured():
    with pytest.raises(RuntimeError, match="not accelerated"):
        check_fused(net())


def test_the_peak_of_a_process_is_its_own():
    """The kernel's ru_maxrss begins with the peak of the process that started it."""
    held = b"x" * (1 << 30)
    code = "from benchmarks.memory import process_peak; print(process_peak())"
    peak = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert 1 << 26 < peak < len(held)


def measured_once(functions, plan):
    for function in functions.values():
        function()
    return {name: summary(1) for name in functions}


def test_targets():
    """Ratios, met and missed, and the overhead, from made-up times."""
    step = dict(zip(VARIANTS, (100, 104, 120, 150, 200, 105, 110), strict=True))
    case = {
        "id": "Llama all linear bfloat16",
        "timing": {name: summary(ms) for name, ms in step.items()},
        "memory": {name: {"peak": 2**20 * (10 + place)} for place, name in enumerate(VARIANTS)},
        "inputs_to_save": 2**20,
    }
    times = {"peft": 0.030, "accelerated": 0.015, "peft's ops": 0.014, "our op": 0.011}
    overhead = {"0": {name: summary(ms) for name, ms in times.items()}}
    assert overheads(overhead["0"]) == pytest.approx((16, 4))
    rows = {(row[1], row[2]): row[3:] for row in models_report.target_rows(case)}
    assert rows["PEFT default, accelerated", "time"] == ["1.15", "1.10", "met"]
    assert rows["PEFT, bf16 adapters, accelerated", "time"] == ["1.06", "1.05", "met"]
    assert rows["ours, float32 adapters", "time"][-1] == "missed"
    assert rows["PEFT default", "its time over the accelerated"] == ["1.50", "1.82", "met"]
    assert rows["PEFT, bf16 adapters", "its time over the accelerated"][-1] == "missed"


def test_targets_of_quantised_bases():
    """Their own limits, and a workspace within the bound."""
    step = dict(zip(VARIANTS, (100, 104, 116, 150, 155, 110, 110), strict=True))
    case = {
        "id": "Llama all linear int8",
        "form": "int8",
        "timing": {name: summary(ms) for name, ms in step.items()},
        "memory": {name: {"peak": 100} for name in VARIANTS},
        "inputs_to_save": 20,
        "workspace": 30,
    }
    assert models_report.memory_bound(case) == pytest.approx(1.03 * 1.5)
    rows = {(row[1], row[2]): row[3:] for row in models_report.target_rows(case)}
    assert rows["ours", "time"] == ["1.15", "1.04", "met"]
    assert rows["ours, float32 adapters", "time"] == ["1.15", "1.16", "missed"]
    assert rows["PEFT default", "its time over the accelerated"] == ["1.40", "1.41", "met"]
    assert rows["PEFT, bf16 adapters", "its time over the accelerated"][-1] == "missed"


def test_a_mixed_batch_is_measured_by_every_variant(monkeypatch):
    """PEFT itself in a forward alone."""
    monkeypatch.setitem(BATCH, "Llama", 2)
    monkeypatch.setitem(LENGTH, "Llama", 4)
    monkeypatch.setattr(mixed_batch, "compared", measured_once)
    row = mixed_batch.measure(Case("Llama", "attention"), None, lambda text: None)
    assert set(row["timing"]) == set(mixed_batch.LABELS) - {"peft"}
    assert set(row["forward"]) == {"frozen", "ours", "accelerated", "peft"}
    assert set(row["memory"]) == set(row["timing"])
    assert row["id"] == "Llama attention bfloat16, 2 adapters"


@pytest.fixture
def always_packs(monkeypatch):
    """Trials that a pack wins, so that nothing depends on times."""
    monkeypatch.setattr(
        "lora_ext.packing.trial.Trial.times",
        lambda trial, wrong: {trial.ruled(wrong): [100.0], "pack": [50.0]},
    )


@pytest.mark.slow
@pytest.mark.skipif(not packable(torch.float32), reason="this torch has no oneDNN")
def test_packed_models_are_measured_beside_a_packed_frozen_one(monkeypatch, always_packs):
    monkeypatch.setattr(packed, "compared", measured_once)
    monkeypatch.setitem(BATCH, "MiniLM", 1)
    monkeypatch.setitem(LENGTH, "MiniLM", 4)
    [row] = packed.measure(None, lambda line: None, [Case("MiniLM", "all linear", "float32")])
    assert set(row["timing"]) == {"frozen", *packed._LABELS} == set(row["forward"])
    assert row["bytes"] > row["weights"] / 2 and len(row["packing"]) == 13
    for key in ("timing", "forward"):
        line = packed.table([row], key).splitlines()[-1]
        assert line.count("1.00 (") == len(packed._LABELS) and "MiB" in line


@pytest.mark.skipif(not packable(torch.float32), reason="this torch has no oneDNN")
def test_the_packed_frozen_model_is_the_frozen_model(always_packs):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    base.requires_grad_(False)
    config = lora_ext.LoraConfig("all-linear", r=4)
    model = lora_ext.apply_lora(copy.deepcopy(base), config, pack=5)
    frozen = packed.frozen_packed(model, base)
    assert all(type(layer) is packed.PackedLinear for layer in frozen)
    found = []
    for each in (frozen, base):
        x = torch.linspace(-1, 1, 120).view(5, 24).requires_grad_()
        y = each(x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
@pytest.mark.skipif(not packable(torch.float32), reason="this torch has no oneDNN")
def test_generate_is_measured_by_every_variant(monkeypatch, always_packs):
    monkeypatch.setattr(generate, "compared", measured_once)
    monkeypatch.setattr(generate, "DTYPES", ("float32",))
    rows = generate.measure(None, lambda line: None, layers=1)
    assert [row["id"] for row in rows] == ["float32, batch 1", "float32, batch 8"]
    wide = {"peft_default", "peft_default_accelerated", "ours_fp32"}
    for row in rows:
        assert set(row["timing"]) == {"merged", *generate._LABELS} - wide
    assert generate.table(rows).splitlines()[-1].count("1.00 (") == len(generate._LABELS) - len(
        wide
    )


class Recorder(TorchDispatchMode):
    """Bytes that each operation reads and writes; a view and an empty tensor take none."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in ("t", "empty_like"):
            read = sum(each.nbytes for each in args if isinstance(each, torch.Tensor))
            self.found.append((read * (name != "bernoulli_"), out.nbytes))
        return out


def test_the_passes_that_are_drawn_are_pefts():
    """On torch's CPU, by what it dispatches; ours read x twice, W once, and write y once."""
    pytest.importorskip("matplotlib")
    from benchmarks.whole_models import passes

    shape = passes.TOKENS, passes.WIDTH
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["0"])
    layer = torch.nn.Linear(shape[1], shape[1], bias=False, dtype=torch.bfloat16)
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    x = torch.ones(shape, dtype=torch.bfloat16)
    with Recorder() as recorder:
        y = model(x)
    assert recorder.found == [(each.read, each.written) for each in passes.PEFT]
    s = 4 * shape[0] * 16
    factors = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    total = 2 * x.nbytes + layer.weight.nbytes + y.nbytes + factors + 2 * s
    assert passes.mebibytes(passes.OURS) * 2**20 == total

"""`lora_ext.warmup` on a CPU: which panels a product takes once they were measured."""

from itertools import chain, combinations

import pytest
import torch
from helpers import BF16, F16, F32, F64, max_error, packable

import lora_ext
from lora_ext import _C, measure
from lora_ext.nn import LoRALinear
from lora_ext.packing import pack, pack_weights, trial
from lora_ext.packing.trial import Trial

pytestmark = pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_call_takes_the_panels_that_were_measured(transposed, monkeypatch, request):
    """Panels of floats are slower than torch at few rows, or everywhere: by the rule none are taken
    for 4 rows."""
    if F32 not in _C.cpu_panel_candidates(F32):
        pytest.skip("no panels of floats here")
    found, us = {4: "float32", 64: "none"}, {"none": 100.0, "float32": 100.0, "pack": 60.0}
    monkeypatch.setattr(Trial, "times", lambda trial, _: {
        name: [time * (0.5 if name == found[trial.rows] else 1.0)] for name, time in us.items()
    })  # fmt: skip
    # Deep enough that the bits of panels and of torch's products differ.
    model = LoRALinear(1000, 1040, r=4, fan_in_fan_out=transposed)
    plain = {panels: products(model, panels) for panels in ("none", "float32", "auto")}
    packing = pack_weights(model, (4, 64))
    assert "in one pass" not in model.path(64)[1]
    assert "lora_ext in float32 at 4 rows (0.50 of the time" in str(packing)
    forward, backward = (F32, 1000, 1040, not transposed), (F32, 1040, 1000, transposed)
    for rows, panels in ((4, "float32"), (3, "float32"), (64, "none"), (20, "none")):
        for kind in (forward, backward):
            assert _C.cpu_panels_of(*kind, rows) == (F32 if panels == "float32" else None)
        for own, asked in zip(products(model)[rows], plain[panels][rows], strict=True):
            assert torch.equal(own, asked), (rows, panels)
    assert all(
        torch.equal(*pair)
        for pair in zip(products(model, "none")[4], plain["none"][4], strict=True)
    )
    request.getfixturevalue("deterministic")
    for rows in (4, 64):
        for own, ruled in zip(products(model)[rows], plain["auto"][rows], strict=True):
            assert torch.equal(own, ruled)


def test_measured_panels_are_of_their_kind_and_the_nearest_rows(request):
    """Nearest by the ratio of rows; by the rule 4 rows have no panels."""
    if F32 not in _C.cpu_panel_candidates(F32):
        pytest.skip("no panels of floats here")
    kind, few, many = (F32, 26, 42, True), (1, 3, 4, 15, 16), (17, 20, 64, 1000)
    ruled = {rows: _C.cpu_panels_of(*kind, rows) for rows in (*few, *many)}
    _C.set_measured_panels(*kind, [(4, F32), (64, None)])

    def found(*other):
        return {rows: _C.cpu_panels_of(*(other or kind), rows) for rows in ruled}

    try:
        measured = dict.fromkeys(few, F32) | dict.fromkeys(many, None)
        assert found() == measured and ruled[4] is None
        # A half's few rows are by panels where it is converted anyway; not of a transposed weight.
        for other in ((BF16, 26, 42, True), (F32, 42, 42, True), (F32, 26, 26, True)):
            assert found(*other)[4] is None
        assert found(F32, 26, 42, False) == ruled
        with torch.backends.mkldnn.flags(enabled=False):
            assert found()[4] is None
        for name, of_many in (("none", None), ("float32", F32)):
            _C.set_cpu_panels(name)
            assert found()[4] is None and found()[64] == of_many
        _C.set_cpu_panels("auto")
        assert found() == measured
        request.getfixturevalue("deterministic")
        assert found() == ruled
        torch.use_deterministic_algorithms(False)
        assert found() == measured
    finally:
        _C.set_cpu_panels("auto")
        _C.set_measured_panels(*kind, [])
    assert found() == ruled


def products(model, panels=None):
    """{rows: (W x, dY W) as a layer computes them}, or with these panels."""
    found = {}
    weight = model.weight.detach()
    kept = weight if model.fan_in_fan_out else weight.t()
    for rows in (3, 4, 20, 64):
        x = torch.randn(rows, model.in_features, generator=seeded())
        grad = torch.randn(rows, model.out_features, generator=seeded())
        own = torch.empty_like(grad), torch.empty_like(x)
        named = None if panels == "auto" else panels
        _C.cpu_product(x, kept, None, own[0], named)
        _C.cpu_product(grad, kept.t(), None, own[1], named)
        found[rows] = own
    return found


def seeded():
    return torch.Generator().manual_seed(1)


FEATURES = ("intel", "amx", "avx512_fp16", "float32", "bfloat16")
SOME = {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("features", "of_float", "of_bfloat16", "of_float16"),
    [
        (SOME | {"intel", "amx", "avx512_fp16"}, None, BF16, None),
        (SOME | {"intel", "avx512_fp16"}, None, F32, None),
        ({"float32", "intel"}, None, F32, F32),
        (SOME, F32, BF16, F32),
        ({"float32"}, F32, F32, F32),
        (set(), None, None, None),
    ],
    ids=["AMX", "Intel, AVX512_BF16", "Intel", "AMD, AVX512_BF16", "AMD, AVX2", "no microkernels"],
)
def test_the_panels_of_a_processor(features, of_float, of_bfloat16, of_float16):
    wanted = {F32: of_float, BF16: of_bfloat16, F16: of_float16, F64: None}
    assert {x: _C.cpu_panel_rule(x, features)[0] for x in wanted} == wanted


def test_no_processor_is_offered_panels_that_fail_on_it():
    """The rule takes what is offered. bfloat16 has walks of our own, from so many rows on."""
    for each in chain(*(combinations(FEATURES, n) for n in range(len(FEATURES) + 1))):
        features = set(each)
        of_halves = [F32] if "float32" in features else []
        pairs = "bfloat16" in features
        offered = {F32: of_halves, F16: of_halves, BF16: of_halves + [BF16] * pairs, F64: []}
        for x, wanted in offered.items():
            rule, candidates = _C.cpu_panel_rule(x, features)
            assert candidates == wanted and rule in (None, *wanted), (features, x)
    least = {"amx": 32, "avx512_bf16": 8}
    for isa in _C.available_cpu_isas():
        _C.set_cpu_isa(isa)
        try:
            assert (BF16 in _C.cpu_panel_candidates(BF16)) == (isa in least)
            if isa in least and _C.cpu_panels(BF16) == BF16:
                by_rows = [_C.cpu_panels_of(BF16, 64, 40, True, least[isa] - n) for n in (1, 0)]
                assert by_rows == [None, BF16]
        finally:
            _C.set_cpu_isa("auto")


@pytest.fixture
def quick(monkeypatch):
    """Trials of two rounds, each of one call."""
    monkeypatch.setattr(measure, "_SECONDS_OF_ROUND", 0.0)
    monkeypatch.setattr(measure, "_ROUNDS_ON_HOST", 2)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(3, 65), (65, 3), (1281, 129), (129, 1281)], ids=str)
def test_what_is_offered_is_right_at_odd_sizes(dtype, shape, quick):
    """Each product that a trial times, in both directions and layouts, and a layer after it."""
    within, out = shape
    for transposed in (False, True):
        torch.manual_seed(0)
        model = LoRALinear(within, out, dtype=dtype, fan_in_fan_out=transposed, r=3)
        torch.nn.init.normal_(model.lora_b.default)
        exact = LoRALinear(within, out, dtype=F64, fan_in_fan_out=transposed, r=3)
        exact.load_state_dict(model.state_dict())
        weights = model.weight.detach().t() if transposed else model.weight.detach()
        packs = [lora_ext.pack_weight(model.weight, backward=True, transposed=transposed)]
        kind = pack.Kind(out, within, dtype, transposed, False)
        for rows in (1, 9):
            x, grad = torch.randn(rows, within).to(dtype), torch.randn(rows, out).to(dtype)
            for p, q, backward in ((x, weights.t(), False), (grad, weights, True)):
                assert not Trial(packs, None, kind, rows, backward).wrong()
                for panels in (None, "none", *map(str, _C.cpu_panel_candidates(dtype))):
                    y = torch.empty(rows, q.shape[1], dtype=dtype)
                    _C.cpu_product(p, q, None, y, panels and panels.removeprefix("torch."))
                    wanted = p.double() @ q.double()
                    bound = 2 * torch.finfo(dtype).eps * wanted.abs().max().item()
                    assert max_error(y, wanted) <= bound + 1e-5, (panels, rows, backward)
        assert not any(each.wrong for each in pack_weights(model, (1, 9)).kinds)
        for rows in (1, 9):
            x, grad = torch.randn(rows, within).to(dtype), torch.randn(rows, out).to(dtype)
            found = [each(x.to(each.weight.dtype).requires_grad_()) for each in (model, exact)]
            assert max_error(*found) <= 16 * torch.finfo(dtype).eps * found[1].abs().max()


@pytest.mark.parametrize("fault", [float("nan"), 1.0])
@pytest.mark.parametrize("wrong", ["float32", "pack"])
def test_a_product_with_other_values_is_not_taken_and_named(wrong, fault, quick, monkeypatch):
    """One column of the last row, forward, of 9 rows; though it is faster."""
    if wrong != "pack" and F32 not in _C.cpu_panel_candidates(F32):
        pytest.skip("no panels of floats here")
    product = Trial.product

    def spoiled(of, name, i):
        y = product(of, name, i)
        if wrong == name and y.shape == (9, 40):
            y[-1, 17] += fault
        return y

    def times(calls, device):
        return {name: [100.0 if name == "none" else 50.0 / (1 + i)] for i, name in enumerate(calls)}

    monkeypatch.setattr(Trial, "product", spoiled)
    monkeypatch.setattr(trial, "interleaved_us", times)
    model = LoRALinear(24, 40, r=4)
    packing = pack_weights(model, (1, 9))
    forward, backward = packing.kinds
    assert (forward.wrong, backward.wrong) == ((wrong,), ())
    text = str(packing)
    if wrong == "pack":
        assert "not packed: values of packed weights differ" in text and "torch's: packed" in text
        assert model.packed.copies[0] is None and model.packed.copies[1] is not None
    else:
        assert {each.panels for each in forward.found} == {None}
        assert "values differ from torch's: lora_ext in float32" in text
        assert _C.cpu_panels_of(F32, 24, 40, True, 9) is None
        assert model.packed.copies[0] is not None


def test_weights_that_are_not_finite_are_no_fault(quick):
    model = LoRALinear(24, 40, r=4)
    with torch.no_grad():
        model.weight[3, 5], model.weight[7, 2] = float("nan"), float("inf")
    assert not any(each.wrong for each in pack_weights(model, (1, 9)).kinds)


def test_which_panels_are_timed():
    """Each candidate beside the rule's; a candidate by another name is refused."""
    packs = [lora_ext.pack_weight(torch.randn(40, 24), backward=True)]
    kind = pack.Kind(40, 24, F32, False, False)
    for backward in (False, True):
        found = Trial(packs, None, kind, 16, backward).found([])
        assert found.panels in (None, *_C.cpu_panel_candidates(F32)) and 0.0 < found.gain <= 1.0
    for name in ("bfloat16", "float"):
        with pytest.raises(ValueError, match="expected panels that this processor can multiply"):
            _C.cpu_product(torch.ones(2, 3), torch.ones(3, 4), None, torch.empty(2, 4), name)
    with pytest.raises(ValueError, match="rows of at least 1"):
        _C.set_measured_panels(F32, 3, 4, False, [(0, None)])

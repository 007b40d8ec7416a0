"""`lora_ext.warmup` on a CPU: which panels a product takes once they were measured."""

import pytest
import torch
from helpers import BF16, F32
from pack_helpers import packable

import lora_ext
from lora_ext import _C
from lora_ext.nn import LoRALinear
from lora_ext.packing import pack, pack_weights
from lora_ext.packing.trial import panels_of

pytestmark = pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_call_takes_the_panels_that_were_measured(transposed, ratios, monkeypatch, request):
    """Panels of floats are slower than torch at few rows, or everywhere: by the rule none are taken
    for 4 rows."""
    if F32 not in _C.cpu_panel_candidates(F32):
        pytest.skip("no panels of floats here")
    ratios |= {(backward, rows): 1.0 for backward in (False, True) for rows in (4, 64)}
    found = {4: F32, 64: None}
    monkeypatch.setattr(pack, "panels_of", lambda packs, kind, rows, backward: (found[rows], 0.5))
    # Deep enough that the bits of panels and of torch's products differ.
    model = LoRALinear(1000, 1040, r=4, fan_in_fan_out=transposed)
    plain = {panels: products(model, panels) for panels in ("none", "float32", "auto")}
    packing = pack_weights(model, (4, 64))
    assert "panels of float32 at 4 rows (0.50 of what" in str(packing)
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
    kind, few, many = (F32, 26, 42, True), (1, 3, 4, 15), (17, 20, 64, 1000)
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


def test_which_panels_are_timed():
    """Each candidate beside the rule's; a candidate by another name is refused."""
    packs = [lora_ext.prepack(torch.randn(40, 24))]
    kind = pack.Kind(40, 24, F32, False, False)
    for backward in (False, True):
        panels, ratio = panels_of(packs, kind, 16, backward)
        assert panels in (None, *_C.cpu_panel_candidates(F32)) and 0.0 < ratio <= 1.0
    for name in ("bfloat16", "float"):
        with pytest.raises(ValueError, match="expected panels that this processor can multiply"):
            _C.cpu_product(torch.ones(2, 3), torch.ones(3, 4), None, torch.empty(2, 4), name)
    with pytest.raises(ValueError, match="rows of at least 1"):
        _C.set_measured_panels(F32, 3, 4, False, [(0, None)])

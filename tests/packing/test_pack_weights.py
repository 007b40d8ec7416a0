"""`lora_ext.warmup` on a CPU: which weights are packed, and what a call takes."""

import copy

import pytest
import torch
from helpers import BF16, F32, F64, max_error
from pack_helpers import packable
from peft_helpers import HEIGHT, WIDTH, accelerated, exact_model, make_ids, net, plain_copy, step
from torch import nn

import lora_ext
from lora_ext import _C, LoRAConfig
from lora_ext.autotune import session
from lora_ext.nn import LoRALinear
from lora_ext.packed_weight import Wins
from lora_ext.packing import pack, pack_weights
from lora_ext.packing.trial import panels_of, ratio_of

pytestmark = pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")


@pytest.fixture
def ratios(monkeypatch):
    """{(backward, rows): ratio} that trials find; 0.5 where nothing is said."""
    found = {}
    monkeypatch.setattr(
        pack,
        "ratio_of",
        lambda packs, bias, kind, rows, backward: (100.0, found.get((backward, rows), 0.5)),
    )
    monkeypatch.setattr(pack, "panels_of", lambda packs, kind, rows, backward: (None, 1.0))
    return found


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test measures is not used by later ones."""
    kinds = []
    kept = pack.keep_panels

    def keep(kind, backward, measured):
        kinds.append((kind, backward))
        kept(kind, backward, measured)

    monkeypatch.setattr(pack, "keep_panels", keep)
    yield
    for kind, backward in kinds:
        kept(kind, backward, [])


def layer(dtype=F32, **words) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(24, 40, dtype=dtype, r=4, **words)
    with torch.no_grad():
        made.lora_b.default.normal_()
    return made


def taken(packed, rows):
    """Whether a call on so many rows takes the pack: (forward, backward)."""
    _, forward, backward = packed.operands(torch.randn(rows, 24))
    return forward is not None, backward is not None


def test_a_call_goes_by_the_nearest_measured_rows(ratios):
    ratios |= {(False, 1): 1.3, (False, 16): 0.6, (True, 1): 0.4, (True, 16): 0.96}
    model = layer()
    pack_weights(model, (16, 1))
    assert model.packed.wins == Wins(((1, 1.3), (16, 0.6)), ((1, 0.4), (16, 0.96)))
    for rows in (1, 2, 3):
        assert taken(model.packed, rows) == (False, True)
    for rows in (5, 16, 10_000):
        assert taken(model.packed, rows) == (True, False)


@pytest.mark.parametrize(("ratio", "is_packed"), [(0.95, True), (0.951, False), (1.2, False)])
def test_a_pack_has_to_win_by_five_percent(ratios, ratio, is_packed):
    ratios |= {(False, 64): ratio, (True, 64): ratio}
    model = layer()
    found = pack_weights(model, (64,))
    assert (model.packed is not None) == is_packed
    assert found.nbytes == 2 * 24 * 40 * 4 * is_packed
    assert ("left as they are" in str(found)) != is_packed


def test_backward_is_packed_where_something_is_trained(ratios):
    model = layer()
    assert {kind.backward for kind in pack_weights(model, (64,)).kinds} == {False, True}
    assert {kind.backward for kind in pack_weights(model, (64,), training=False).kinds} == {False}
    model.requires_grad_(False)
    assert {kind.backward for kind in pack_weights(model, (64,)).kinds} == {False}
    assert model.packed.copies[1] is None


def test_backward_alone(ratios):
    ratios[False, 64] = 1.0
    model = layer()
    plain = copy.deepcopy(model)
    pack_weights(model, (64,))
    assert model.packed.copies[0] is None and model.packed.is_packed
    assert model.path(64)[0] == "fused" and "packed for backward alone" in model.path(64)[1]
    x = torch.randn(64, 24)
    found = [each.requires_grad_() for each in (x.clone(), x.clone())]
    y, other = model(found[0]), plain(found[1])
    assert torch.equal(y, other)
    y.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(found[0].grad, found[1].grad)
    assert torch.equal(model.lora_b.default.grad, plain.lora_b.default.grad)


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


def test_the_budget_goes_where_most_is_saved_for_a_byte(ratios, monkeypatch):
    one = 24 * 40 * 4
    ratios |= {(False, 64): 0.8, (True, 64): 0.5}
    for budget, forward, backward in ((0, 0, 0), (one - 1, 0, 0), (one, 0, 1), (3 * one, 1, 2)):
        model = nn.Sequential(layer(), layer())
        found = pack_weights(model, (64,), budget=budget)
        assert {kind.backward: kind.packed for kind in found.kinds} == {
            False: forward,
            True: backward,
        }
        assert found.nbytes == (forward + backward) * one <= budget == found.budget
    with pytest.raises(ValueError, match="budget of 0 bytes or more, but got -1"):
        pack_weights(model, (64,), budget=-1)


def test_without_a_budget_a_quarter_of_the_free_memory(ratios, monkeypatch):
    assert 2**20 < pack.default_budget() < 2**50
    monkeypatch.setattr(pack, "default_budget", lambda: 0)
    assert pack_weights(layer(), (64,)).nbytes == 0


def test_tied_weights_share_a_pack(ratios):
    first, second = layer(), layer()
    second.weight = first.weight
    found = pack_weights(nn.Sequential(first, nn.Identity(), second), (64,), training=False)
    assert first.packed is second.packed and found.nbytes == 24 * 40 * 4
    assert found.kinds[0].count == found.kinds[0].packed == 1


def test_what_cannot_be_packed_says_why(ratios):
    trained = layer()
    trained.weight.requires_grad_(True)
    model = nn.Sequential(trained, layer(F64), nn.Linear(4, 4))
    found = pack_weights(model, (64,))
    assert not found.kinds and trained.packed is None
    assert "not packed: it is trained" in str(found) and "float64" in str(found)


def test_deterministic_algorithms_are_not_timed(deterministic):
    model = layer()
    found = pack_weights(model, (64,))
    assert model.packed is None and "use_deterministic_algorithms" in found.reasons[0]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_trial_times_both_directions(dtype):
    if not packable(dtype):
        pytest.skip("oneDNN does not pack bfloat16 on this processor")
    model = nn.Sequential(layer(dtype), layer(dtype))
    before = torch.get_rng_state()
    lines = []
    found = pack_weights(model, (1, 7), say=lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert [kind.backward for kind in found.kinds] == [False, True] and len(lines) == 2
    for kind in found.kinds:
        assert [rows for rows, _ in kind.ratios] == [1, 7]
        assert all(ratio > 0 for _, ratio in kind.ratios)


def test_a_trial_that_does_not_win_three_rounds_of_four_counts_as_slower(monkeypatch):
    """Whatever the medians say."""
    from lora_ext.packed_weight import prepack
    from lora_ext.packing import trial
    from lora_ext.packing.layers import Kind

    # warm-up of both, then rounds in which the packed product wins by far, in half of them
    times = iter([1.0, 1.0] + [1.0, 0.1, 1.1, 1.0] * 2)
    monkeypatch.setattr(trial, "_seconds", lambda *_: next(times))
    packed = prepack(torch.randn(8, 8))
    kind = Kind(8, 8, F32, False, False)
    assert ratio_of([packed], None, kind, 3, False)[1] >= 1.0


# ---- models ----


def own_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    return lora_ext.apply_lora(model, LoRAConfig("all-linear", r=4, alpha=8))


def test_warmup_packs_a_model_on_the_cpu(ratios):
    model = own_model()
    said = []
    found = lora_ext.warmup(model, rows=(2, 64), progress=said.append)
    assert found.packing is not None and str(found) == str(found.packing)
    assert len(said) == 4
    assert repr([found]) == f"[Warmup(Packing(4 packs, {found.packing.nbytes / 2**20:.3g} MiB))]"
    kinds = [(kind.kind.in_features, kind.packed) for kind in found.packing.kinds]
    assert sorted(kinds) == [(24, 1), (24, 1), (40, 1), (40, 1)]
    assert lora_ext.warmup(model, rows=2, pack_budget=0, progress=False).packing.nbytes == 0
    assert all(layer.path == "fused" for layer in lora_ext.explain(model))


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_is_packed_if_asked(ratios, monkeypatch):
    asked = []
    monkeypatch.setattr(session._C, "with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "indexed", lambda device: asked.append(device) or 1 / 0)
    monkeypatch.setattr(session, "_device_of", lambda model: torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        lora_ext.warmup(own_model(), rows=64, progress=False)
    assert asked == [torch.device("cuda")]
    assert lora_ext.warmup(own_model(), rows=64, device="cpu", progress=False).packing.nbytes


def test_explain_says_what_a_pack_costs_and_wins(ratios):
    ratios[False, 1] = 1.4
    model = own_model()
    lora_ext.warmup(model, rows=(1, 64), progress=False)
    few, many = lora_ext.explain(model, 1)[0], lora_ext.explain(model, 64)[0]
    assert few.path == "fused" and "packed, the product takes 1.40 of its time" in few.reason
    assert many.path == "packed" and "measured at 0.50 of the plain product's time" in many.reason
    assert "MiB" in many.reason
    explained = lora_ext.explain(model, 64)
    assert explained.packed_bytes == 2 * 2 * 24 * 40 * 4
    assert str(explained).splitlines()[-1] == "packed weights: 0.0146 MiB"


@pytest.mark.parametrize("make", ["own", "peft"])
def test_pack_in_one_word(ratios, make):
    if make == "own":
        torch.manual_seed(0)
        bare = nn.Sequential(nn.Linear(24, 40))
        model = lora_ext.apply_lora(bare, LoRAConfig("all-linear", r=4), pack=(3, 64))
        rows = (3, 64)
    else:
        model = lora_ext.accelerate(net(), pack=True)
        rows = pack.DECODE_AND_TRAINING
    packs = {m.packed for m in model.modules() if getattr(m, "packed", None) is not None}
    assert len(packs) == (1 if make == "own" else 3)
    for each in packs:
        assert tuple(n for n, _ in each.wins.forward) == rows


@pytest.mark.parametrize("words", ["yes", 0, (), (4, 0), 1.5, (2.5,)], ids=str)
def test_pack_takes_a_bool_or_rows(words):
    with pytest.raises((TypeError, ValueError), match="lora_ext: expected"):
        lora_ext.accelerate(net(), pack=words)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_accelerated_model_gives_the_same_from_packs(ratios, dtype):
    """Linear, a Linear without bias and a Conv1D, whose weight is [in, out]."""
    if not packable(dtype):
        pytest.skip("oneDNN does not pack bfloat16 on this processor")
    model = accelerated(net(dtype=dtype))
    plain, exact = copy.deepcopy(model), exact_model(model)
    lora_ext.warmup(model, rows=(54,), progress=False)
    paths = {layer.name[-4:]: layer.path for layer in lora_ext.explain(model)}
    assert paths == {"mbed": paths["mbed"], "l.up": "packed", "gate": "packed", "down": "packed"}
    ids = make_ids()
    found, unpacked, wanted = (step(each, ids, dtype=dtype) for each in (model, plain, exact))
    assert found.keys() == unpacked.keys() == wanted.keys() and len(found) > 6
    for name, right in wanted.items():
        floor = torch.finfo(dtype).eps * right.abs().max().item()
        assert max_error(found[name], right) <= 2 * max_error(unpacked[name], right) + floor, name


def test_state_dicts_and_copies_know_nothing_of_packs(ratios):
    model = accelerated(net())
    before = model.state_dict()
    lora_ext.warmup(model, rows=(54,), progress=False)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    other = copy.deepcopy(model)
    layer = other.base_model.model.up
    assert layer.packed is None or not layer.packed.is_packed
    assert {each.path for each in lora_ext.explain(other) if "embed" not in each.name} == {"fused"}
    torch.testing.assert_close(other(make_ids()), model(make_ids()))
    assert plain_copy(model).base_model.model.up.__dict__.get("packed") is None


CHANGES = {
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "merged safely": lambda model: (model.merge_adapter(safe_merge=True), model.unmerge_adapter()),
    "written to": lambda model: model.base_model.model.up.base_layer.weight.mul_(2.0),
    "other data": lambda model: setattr(
        model.base_model.model.up.base_layer.weight, "data", torch.randn(HEIGHT, WIDTH)
    ),
    "another parameter": lambda model: setattr(
        model.base_model.model.up.base_layer,
        "weight",
        nn.Parameter(torch.randn(HEIGHT, WIDTH), requires_grad=False),
    ),
    "loaded": lambda model: model.load_state_dict(
        {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    ),
    "another base": lambda model: setattr(
        model.base_model.model.up, "base_layer", nn.Linear(WIDTH, HEIGHT).requires_grad_(False)
    ),
    "cast and back": lambda model: model.to(BF16).to(F32),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fast", [True, False])
def test_a_pack_does_not_outlive_a_change_of_an_accelerated_model(
    ratios, monkeypatch, change, fast
):
    model = accelerated(net())
    lora_ext.warmup(model, rows=(54,), progress=False)
    layer = model.base_model.model.up
    assert layer.packed.is_packed
    with torch.no_grad():
        CHANGES[change](model)
    plain = plain_copy(model)
    if not fast:
        monkeypatch.setattr("lora_ext.peft.linear.fast_path_forward", lambda layer, x: None)
    x = torch.randn(54, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain.base_model.model.up(x))
    assert layer.packed is None or not layer.packed.is_packed
    assert layer.path(54)[0] == "fused"


def test_hot_swapped_factors_are_never_packed(ratios):
    """Factors change from call to call, also by `.data`, which no version counts."""
    model = accelerated(net()).eval()
    lora_ext.warmup(model, rows=(54,), progress=False)
    layer = model.base_model.model.up
    x = torch.randn(54, WIDTH)
    with torch.no_grad():
        before = layer(x)
        layer.lora_A["a"].weight.data.mul_(2.0)
        after = layer(x)
    torch.testing.assert_close(after, plain_copy(model).base_model.model.up(x))
    assert not torch.equal(before, after)


def test_rows_with_a_bias_of_their_own_go_beside_a_conv1d_that_is_packed(ratios):
    """The base alone, whose weight is [in, out] and here square."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(24, 24, fan_in_fan_out=True, r=4, lora_bias=True))
    with torch.no_grad():
        for parameter in model[0].lora_b.parameters():
            parameter.normal_()
    x, names = torch.randn(64, 24), ["default"] * 64
    with torch.no_grad(), lora_ext.use_adapters(model, names):
        plain = model(x)
        pack_weights(model, (64,))
        assert model[0].packed.transposed
        torch.testing.assert_close(model(x), plain)


def test_rows_of_many_adapters_use_packs(ratios):
    model = accelerated(net("three"))
    lora_ext.warmup(model, rows=(54,), progress=False)
    plain = plain_copy(model).eval()
    names = ["a", "b", "c", "__base__", "a", "b"]
    with torch.no_grad():
        found = model.eval()(make_ids(), adapter_names=names)
        torch.testing.assert_close(found, plain(make_ids(), adapter_names=names))

"""`lora_ext.warmup` on a CPU: which weights are packed, and what a call takes."""

import copy

import pytest
import torch
from helpers import BF16, F32, F64, packable
from torch import nn

from lora_ext.nn import LoRALinear
from lora_ext.packed_weight import Wins
from lora_ext.packing import pack, pack_weights, trial

pytestmark = pytest.mark.skipif(not packable(F32), reason="this torch has no oneDNN")


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
    assert ("not packed" in str(found)) != is_packed


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
    assert "not packed: the weight is trained" in str(found) and "float64" in str(found)


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
    times = {"none": [1.0] * 8, "float32": [1.0] * 8, "pack": [0.1] * 5 + [1.1] * 3}
    monkeypatch.setattr(trial, "interleaved_us", lambda calls, device: times)
    model = layer()
    assert not pack_weights(model, (3,)).nbytes
    times["pack"][5] = 0.9
    assert pack_weights(model, (3,)).nbytes

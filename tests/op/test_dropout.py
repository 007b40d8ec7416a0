"""The dropout mask: its bits, its statistics, and that every pass of every route uses the same."""

import math

import op_calls
import philox_reference
import pytest
import torch
from helpers import BF16, F16, F32, F64, keep_scale_of, make_problem, mask_of, pair_id, run_ours

import lora_ext
from lora_ext.functional import dropout_mask

SEED = 0x1234_5678_9ABC_DEF0


# ---- the mask that each pass of a route really applies, read out of its results ----


def applied_in_forward(x, dropout_p, seed, row_offset=0, col_offset=0):
    """keep_scale * mask from S = drop(x) lora_a^T with x = 1 and lora_a = identity, in pieces."""
    cols = x.shape[1]
    pieces = []
    for first in range(0, cols, 512):
        rank = min(512, cols - first)
        lora_a = torch.zeros(rank, cols, device=x.device)
        lora_a[:, first : first + rank] = torch.eye(rank, device=x.device)
        _, s = op_calls.lora_linear_forward(
            torch.ones_like(x), torch.zeros_like(x[:1]), lora_a.to(x.dtype), x.new_ones(1, rank),
            None, 1.0, dropout_p, seed, row_offset, col_offset, False, None,
        )  # fmt: skip
        pieces.append(s.float())
    return torch.cat(pieces, 1)


def applied_in_dx(x, dropout_p, seed, row_offset=0, col_offset=0):
    """keep_scale * mask from dx = mask * (dS lora_a) with dS lora_a = 1 and a zero weight."""
    leaf = x.detach().requires_grad_()
    y = op_calls.lora_linear(
        leaf, torch.zeros_like(x[:1]), torch.ones_like(x[:1]), x.new_ones(1, 1), None,
        1.0, dropout_p, seed, row_offset, col_offset,
    )  # fmt: skip
    y.backward(torch.ones_like(y))
    return leaf.grad.float()


def applied_in_dlora_a(x, dropout_p, seed, row_offset=0, col_offset=0, with_dx=True):
    """keep_scale * mask from dlora_a = dS^T drop(x) with x = 1 and dS = identity."""
    rows, cols = x.shape
    eye = torch.eye(rows, dtype=x.dtype, device=x.device)
    lora_a = torch.zeros(rows, cols, dtype=x.dtype, device=x.device).requires_grad_()
    y = op_calls.lora_linear(
        torch.ones_like(x).requires_grad_(with_dx), x.new_zeros(rows, cols), lora_a, eye, None,
        1.0, dropout_p, seed, row_offset, col_offset,
    )  # fmt: skip
    y.backward(eye)
    return lora_a.grad.float()


def applied_in_dlora_a_alone(*args):
    return applied_in_dlora_a(*args, with_dx=False)


PASSES = [applied_in_forward, applied_in_dx, applied_in_dlora_a, applied_in_dlora_a_alone]


@pytest.mark.parametrize("applied", PASSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "row_offset", "col_offset"),
    [
        (70, 129, 0, 0),
        (49, 1100, 5, 37),
        (16, 65, 2**33 + 5, 1),
        (64, 97, 2**32 - 20, 2**32 - 13),
        (131, 64, 2**40 + 1, 31),
    ],
)
def test_every_pass_applies_the_same_mask(
    isa, device, applied, dtype, rows, cols, row_offset, col_offset
):
    x = torch.zeros(rows, cols, dtype=dtype, device=device)
    seed = torch.tensor(SEED, device=device)
    offsets = (row_offset, col_offset)
    mask = dropout_mask(SEED, rows, cols, 0.5, *offsets, device=device)
    assert torch.equal(applied(x, 0.5, seed, *offsets), mask * 2.0)


@pytest.mark.parametrize("dropout_p", [0.1, 0.3, 0.9, 1 / 65536, 65535 / 65536])
def test_kept_elements_are_divided_by_the_rounded_keep_probability(isa, device, dropout_p):
    x = torch.zeros(60, 70, device=device)
    seed = torch.tensor(SEED, device=device)
    mask = dropout_mask(SEED, 60, 70, dropout_p, device=device)
    for applied in PASSES:
        value = applied(x, dropout_p, seed)
        assert torch.equal(value != 0, mask), applied.__name__
        # The scale is rounded to float32 once, and once more by a product with it.
        torch.testing.assert_close(value, mask * keep_scale_of(dropout_p), rtol=2e-7, atol=0)


def test_a_keep_probability_that_rounds_to_one_drops_nothing(isa, device):
    problem = make_problem(60, 40, 30, 4, device=device)
    with_tiny_p, without = run_ours(problem, 1e-6), run_ours(problem)
    assert torch.equal(with_tiny_p.y, without.y)
    assert torch.equal(with_tiny_p.dx, without.dx)
    assert dropout_mask(SEED, 100, 100, 1e-6, device=device).all()


# ---- the bits ----


@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
@pytest.mark.parametrize(
    ("row_offset", "col_offset"),
    [(0, 0), (3, 1), (2**32 - 2, 31), (2**33 + 1, 77), (2**62, 2**33 + 3)],
)
def test_mask_is_philox(device, seed, dropout_p, row_offset, col_offset):
    offsets = (row_offset, col_offset)
    mask = dropout_mask(seed, 4, 75, dropout_p, *offsets, device=device)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), philox_reference.mask(seed, 4, 75, dropout_p, *offsets))


def test_philox_reference_has_the_published_bits():
    """Random123's known answers of Philox-4x32-7 for counters and keys of zeros and of ones."""
    zeros = philox_reference.philox_4x32([0] * 4, [0] * 2, rounds=7)
    assert zeros == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = philox_reference.philox_4x32([2**32 - 1] * 4, [2**32 - 1] * 2, rounds=7)
    assert ones == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 511, 512, 513, 1057])
def test_offsets_are_slices_of_the_whole_mask(device, cols):
    row0, col0 = 2**33 - 7, 64
    whole = dropout_mask(SEED, 40, cols + 67, 0.4, row0, col0, device=device)
    for row, col in [(0, 0), (1, 1), (7, 32), (13, 67), (39, 5)]:
        rows = 40 - row
        part = dropout_mask(SEED, rows, cols, 0.4, row0 + row, col0 + col, device=device)
        assert torch.equal(part, whole[row:, col : col + cols]), (row, col)


def test_seed_may_be_a_tensor_or_an_int(device):
    seed = torch.tensor([SEED], device=device)
    given = dropout_mask(seed, 9, 9, 0.5)
    assert given.device == seed.device
    assert torch.equal(given, dropout_mask(SEED, 9, 9, 0.5, device=device))


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_mask_of_nothing(device, rows, cols):
    assert dropout_mask(1, rows, cols, 0.5, device=device).shape == (rows, cols)


# ---- statistics; seeds are fixed, so that a failure is a bug and not bad luck ----


def z_score(successes: int, trials: int, probability: float) -> float:
    return (successes - trials * probability) / math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("dropout_p", [0.001, 0.05, 0.1, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("seed", [1, 2, SEED])
def test_keep_rate_is_binomial(device, dropout_p, seed):
    mask = dropout_mask(seed, 1024, 777, dropout_p, device=device)
    keep = 1 / keep_scale_of(dropout_p)
    assert abs(z_score(mask.sum().item(), mask.numel(), keep)) < 4
    # In rows and in columns too: chi-square of n counts is n +- sqrt(2 n).
    for counts, trials in [(mask.sum(0), 1024), (mask.sum(1), 777)]:
        deviations = (counts.double() - trials * keep).square() / (trials * keep * (1 - keep))
        assert abs(deviations.sum().item() - len(counts)) < 5 * math.sqrt(2 * len(counts))


def agreement_is_that_of_strangers(a, b, dropout_p) -> bool:
    keep = 1 / keep_scale_of(dropout_p)
    same = keep**2 + (1 - keep) ** 2
    return abs(z_score((a == b).sum().item(), a.numel(), same)) < 4.5


@pytest.mark.parametrize(
    "shift", [(0, 1), (0, 2), (0, 8), (0, 32), (0, 64), (1, 0), (1, 1), (64, 0)]
)
def test_neighbours_are_independent(device, shift):
    mask = dropout_mask(SEED, 600, 600, 0.3, device=device)
    rows, cols = 600 - shift[0], 600 - shift[1]
    assert agreement_is_that_of_strangers(mask[:rows, :cols], mask[shift[0] :, shift[1] :], 0.3)


@pytest.mark.parametrize("other", [SEED + 1, SEED ^ (1 << 32), SEED ^ (1 << 62), 0])
def test_seeds_are_independent(device, other):
    masks = [dropout_mask(s, 500, 500, 0.3, device=device) for s in (SEED, other)]
    assert agreement_is_that_of_strangers(*masks, 0.3)


# ---- forward and backward, layers and repeats ----


def layers_on(x, seed):
    """Two layers on one x with zero weights: the updates alone, 1 where the mask keeps x."""
    torch.manual_seed(seed)
    weight, lora_b = torch.zeros(50, 50, device=x.device), torch.eye(50, device=x.device)
    lora_a = torch.eye(50, device=x.device)
    return [lora_ext.lora_linear(x, weight, lora_a, lora_b, dropout_p=0.5) for _ in range(2)]


def test_layers_that_share_x_have_independent_masks(device):
    first, second = layers_on(torch.ones(400, 50, device=device), seed=3)
    assert agreement_is_that_of_strangers(first != 0, second != 0, 0.5)


def test_manual_seed_repeats_the_masks(device):
    x = torch.ones(60, 50, device=device)
    assert all(map(torch.equal, layers_on(x, seed=3), layers_on(x, seed=3)))
    assert not torch.equal(layers_on(x, seed=3)[0], layers_on(x, seed=4)[0])


def test_no_generator_is_touched_without_dropout(device):
    problem = make_problem(60, 50, 40, 4, device=device)
    before = torch.get_rng_state()
    plain = lora_ext.lora_linear(*problem.operands)
    evaluated = lora_ext.lora_linear(*problem.operands, dropout_p=0.5, training=False)
    assert torch.equal(plain, evaluated)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=pair_id)
def test_row_shards_reproduce_the_whole(isa, device, pair):
    """A sharded batch: row_offset counts rows of x flattened to [M, K]. Integers leave no error."""
    problem = make_problem((4, 50), 70, 30, 5, pair, device, scaling=0.5, integers=3)
    op, seed = op_calls.lora_linear, torch.tensor(SEED, device=device)
    rest = (problem.weight, problem.lora_a, problem.lora_b, problem.bias, 0.5, 0.5, seed)
    whole = op(problem.x, *rest)
    shards = [op(problem.x[i : i + 1], *rest, 50 * i) for i in range(4)]
    assert torch.equal(whole, torch.cat(shards))
    assert not torch.equal(whole[1:2], op(problem.x[1:2], *rest, 0))


def test_column_shards_reproduce_the_whole(isa, device):
    """A layer split along in_features: its parts add up when col_offset says where they start."""
    problem = make_problem(70, 150, 30, 5, device=device, bias=False, scaling=0.5, integers=3)
    op, seed = op_calls.lora_linear, torch.tensor(SEED, device=device)

    def part(first, last):
        tensors = (t[:, first:last] for t in (problem.x, problem.weight, problem.lora_a))
        return op(*tensors, problem.lora_b, None, 0.5, 0.5, seed, 0, first)

    assert torch.equal(part(0, 150), part(0, 67) + part(67, 150))


def test_dropped_elements_do_not_propagate_nan(isa, device):
    """The update does not see an x that is dropped; a zero weight column hides the base's."""
    problem = make_problem(64, 40, 30, 4, device=device, bias=False)
    mask = mask_of(problem, 0.5, SEED)
    x = torch.where(mask, problem.x, torch.full_like(problem.x, float("nan")))
    tensors = (torch.zeros_like(problem.weight), problem.lora_a, problem.lora_b)
    seed = torch.tensor(SEED, device=device)
    _, s = op_calls.lora_linear_forward(x, *tensors, None, 1.0, 0.5, seed, 0, 0, False, None)
    assert s.isfinite().all()
    lora_a = problem.lora_a.detach().requires_grad_()
    y = op_calls.lora_linear(x, tensors[0], lora_a, tensors[2], None, 1.0, 0.5, seed)
    y.backward(torch.ones_like(y))
    assert lora_a.grad.isfinite().all()

"""Dropout of adapters on experts, against a layer in float64 that is given the masks."""

from dataclasses import replace

import pytest
import torch
from expert_cases import Case, some_index
from expert_helpers import EXPERTS, HIDDEN, SEEDS, assert_close
from helpers import BF16, F16, F32, F64, pair_id

from lora_ext.experts import grouped_product, layer, lora_experts
from lora_ext.functional import dropout_mask

P = 0.3
CASE = Case(index=some_index(9, 3), dropout=P)


@pytest.mark.parametrize("is_grouped", [False, True], ids=["by expert", "grouped product"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F32), (F32, F32)], ids=pair_id)
def test_other_dtypes_have_the_same_masks(device, pair, tokens, is_grouped, monkeypatch):
    """One token, which without dropout the op of few rows takes; and torch's grouped product, as on
    a GPU."""
    if is_grouped:
        monkeypatch.setattr(grouped_product, "DEVICES", ("cpu", "cuda"))
    index = some_index(tokens, 3)
    case = replace(CASE, pair=pair, index=index, ranks=((3, 3),), device=device)
    found = case.step(lora_experts)
    assert_close(found, case.exact(), 1e-5 if pair[0] == F32 else 3e-2)
    with pytest.raises(AssertionError):
        assert_close(found, replace(case, dropout=0.0).exact(), 6e-2)


def test_h_is_kept_where_a_trained_gate_computed_it():
    """Masked rows are a copy: the gradients of the router's weights are of h itself."""
    experts = CASE.experts_of()._replace(is_gate_trained=True)
    assert_close(CASE.step(lora_experts, experts), CASE.exact(experts), 1e-11)


def test_a_gate_that_draws_has_in_backward_what_it_drew():
    """As where autograd keeps h; and the generator goes on as if nothing had been drawn again."""
    experts, found = CASE.experts_of(), []
    gate = experts.gate
    experts = experts._replace(gate=lambda z: torch.nn.functional.dropout(gate(z), 0.5))
    for one in (experts, experts._replace(is_gate_trained=True)):
        torch.manual_seed(5)
        found.append(CASE.step(lora_experts, one) | {"next": torch.rand(3)})
    assert_close(*found, 1e-12)


@pytest.mark.parametrize("p", [-0.5, torch.nan, 1.0, torch.inf])
def test_dropout_that_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=rf"expected dropout in \[0, 1\), but got \[{p}\]"):
        replace(CASE, dropout=p).step(lora_experts)


def reordered(experts, x, index, weights, up, down, own):
    """The layer with its experts in another order."""
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    for side in (up, down):
        ((a, b, *others),) = side
        a = a.view(EXPERTS, -1, a.shape[1])[order].reshape(a.shape)
        b = b.view(len(b), -1, EXPERTS)[:, :, order].reshape(b.shape)
        side[0] = type(side[0])(a, b, *others)
    experts = experts._replace(up=experts.up[order], down=experts.down[order])
    return lora_experts(experts, x, order.argsort()[index], weights, up, down, own)


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_the_order_of_experts_does_not_matter(dtype):
    """Rows are sorted in another way then; a token's masks are the same."""
    case = replace(CASE, pair=(dtype, dtype), index=some_index(64, 3), ranks=((3, 3),))
    first, second = case.step(lora_experts), case.step(reordered)
    assert_close(second, {n: v.double() for n, v in first.items()}, 1e-12 if dtype == F64 else 2e-2)
    if dtype == BF16:
        assert torch.equal(first["y"], second["y"])


def test_a_token_has_one_mask_of_x_and_a_mask_of_h_for_each_slot(monkeypatch):
    """Twice the same expert: the update of the first projection is the same, of the second not."""
    case = replace(CASE, index=((4, 4),) * 5, ranks=((3, 3),))
    experts = case.experts_of()
    _, (x, index, _, up, down, _), _ = case.made(experts)
    monkeypatch.setattr(layer, "draw_seed", lambda device: torch.tensor(SEEDS[0]))

    def slot(number, **adapters):
        only = torch.zeros(5, 2, dtype=F64)
        only[:, number] = 1.0
        return lora_experts(experts, x, index, only, **adapters)

    torch.testing.assert_close(slot(0, up=up), slot(1, up=up), rtol=1e-12, atol=1e-12)
    assert torch.equal(slot(0, down=down), slot(0, down=down))
    assert float((slot(0, down=down) - slot(1, down=down)).abs().max()) > 1e-3


def test_adapters_that_differ_in_dropout_are_refused():
    def layer_of(experts, x, index, weights, up, *_):
        return lora_experts(experts, x, index, weights, [up[0]._replace(dropout=0.1), up[1]])

    message = r"one dropout for all active adapters .* but got \[0.1, 0.3\]; give them the same"
    with pytest.raises(ValueError, match=message):
        CASE.step(layer_of)


DROP = torch.ops.lora_ext.drop_rows


@pytest.mark.parametrize("columns", [1, 7, 8, 40, HIDDEN * 40 + 3])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16], ids=str)
def test_rows_get_the_masks_of_other_rows(dtype, columns):
    """In place, in a part of wider rows; what is dropped is zero, NaN too, the rest as it was."""
    wide = torch.randn(5, columns + 3).to(dtype)
    x, rows = wide[:, :columns], torch.tensor([2**33, 0, 3, 3, 40])
    kept = torch.cat([dropout_mask(7, 1, columns, P, int(row)) for row in rows])
    x[~kept] = torch.nan
    wanted, beside = torch.where(kept, x, 0), wide[:, columns:].clone()
    DROP(x, rows, torch.tensor(7), P)
    assert torch.equal(x, wanted) and torch.equal(wide[:, columns:], beside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8, 1)}, "expected x of shape"),
        ({"x": torch.ones(8, 2).t()}, "contiguous along its columns"),
        ({"x": torch.ones(2, 8, dtype=torch.int16)}, "x"),
        ({"rows": torch.ones(2, dtype=torch.int32)}, "of each of 2 rows, as int64, but got Int"),
        ({"rows": torch.ones(3, dtype=torch.int64)}, r"of each of 2 rows, .* \[3\]"),
        ({"seed": torch.ones(1)}, "expected seed of dtype int64"),
        ({"p": 1.0}, "dropout_p"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, message):
    given = {"x": torch.ones(2, 8), "rows": torch.arange(2), "seed": torch.tensor(7), "p": P}
    with pytest.raises((RuntimeError, TypeError), match=message):
        DROP(*(given | change).values())

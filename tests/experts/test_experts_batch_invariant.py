"""Experts in `lora_ext.batch_invariant`: a token has the same bits in any batch."""

import pytest
import torch
from expert_helpers import make_experts
from four_bit_experts import make_four_bits
from helpers import BF16, F16, F32, F64

import lora_ext
from lora_ext import _C
from lora_ext.experts import Experts, ExpertsAdapter, gate_blocks, lora_experts

EXPERTS, SIZES, TOKENS, SLOTS = 5, (96, 128), 70, 2


def layer(kind, dtype, is_quantised=False):
    torch.manual_seed(2)
    module = make_experts(kind, EXPERTS, SIZES).to(dtype)
    if is_quantised:
        for name in ("gate_up_proj", "down_proj"):
            make_four_bits(module, name)
    return Experts.of(module)


def adapters(experts, dtype):
    """Two for each projection."""
    found = []
    for stack in (experts.up, experts.down):
        out, inner = stack.shape[1:]
        if experts.is_transposed:
            out, inner = inner, out
        found.append(
            [
                ExpertsAdapter(
                    torch.randn(EXPERTS * r, inner).to(dtype),
                    torch.randn(out, r * EXPERTS).to(dtype),
                    0.3,
                )
                for r in (3, 8)
            ]
        )
    return found


def some(experts, up, down, index, first, count, dtype):
    """(y, dx) of some of the tokens; index: of each token's adapter, or None."""
    generator = torch.Generator().manual_seed(4)
    where = slice(first, first + count)
    x = torch.randn(TOKENS, SIZES[0], generator=generator).to(dtype)[where].requires_grad_()
    grad = torch.randn(TOKENS, SIZES[0], generator=generator).to(dtype)[where]
    scores = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1)
    scores[:30, 0] += 1  # one expert is chosen by many
    weights, chosen = (each[where] for each in scores.topk(SLOTS))
    own = None if index is None else index[where]
    y = lora_experts(experts, x, chosen, weights, up, down, own)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("given", ["none", "all", "by row"])
@pytest.mark.parametrize("kind", ["plain", "transposed, biases, interleaved", "4 bits"])
def test_a_token_has_the_same_bits_in_any_batch(dtype, given, kind):
    if kind == "4 bits" and dtype not in (BF16, F16):
        pytest.skip("the stack has a half compute dtype")
    is_quantised = kind == "4 bits"
    experts = layer("plain" if is_quantised else kind, dtype, is_quantised)
    up, down = ([], []) if given == "none" else adapters(experts, dtype)
    index = torch.arange(TOKENS) % 3 - 1 if given == "by row" else None
    with lora_ext.batch_invariant():
        if _C.cpu_panels(dtype, batch_invariant=True) is None:
            with pytest.raises(NotImplementedError, match="batch_invariant"):
                some(experts, up, down, index, 0, TOKENS, dtype)
            return
        whole = some(experts, up, down, index, 0, TOKENS, dtype)
        for first, count in ((0, 1), (1, 2), (5, 9), (30, 40)):
            part = some(experts, up, down, index, first, count, dtype)
            for name, own, all_rows in zip(("y", "dx"), part, whole, strict=True):
                assert torch.equal(own, all_rows[first : first + count]), (name, first, count)
        for g in range(2 if given == "by row" else 0):
            alone = some(experts, up[g : g + 1], down[g : g + 1], None, 0, TOKENS, dtype)
            for own, all_rows in zip(alone, whole, strict=True):
                assert torch.equal(own[index == g], all_rows[index == g]), g


@pytest.mark.parametrize("sizes", [(16, 24), (17, 23)])
@pytest.mark.parametrize("kind", ["own gate", "no gate"])
def test_gates_of_rows_that_are_no_whole_vectors(kind, sizes, monkeypatch):
    """torch's functions compute the last elements of a call one by one, with other bits."""
    if _C.cpu_panels(F32, batch_invariant=True) is None:
        pytest.skip("no products by panels")
    monkeypatch.setitem(globals(), "SIZES", sizes)
    experts = layer(kind, F32)
    up, down = adapters(experts, F32)
    with lora_ext.batch_invariant():
        whole = some(experts, up, down, None, 0, TOKENS, F32)
        for first, count in ((0, 1), (3, 6), (5, 33), (7, 41)):
            part = some(experts, up, down, None, first, count, F32)
            for own, all_rows in zip(part, whole, strict=True):
                assert torch.equal(own, all_rows[first : first + count]), (first, count)


@pytest.mark.parametrize("columns", [1, 24, 23, 1536, 1537, 14336, 50000])
def test_rows_of_a_gates_call(columns):
    rows = gate_blocks.rows_of_a_call(columns)
    assert rows == 1 or (rows * columns % 256 == 0 and rows * columns <= 32768)
    z = torch.randn(rows + 1, columns)
    assert torch.equal(gate_blocks.in_equal_blocks(torch.neg, z), -z)
    assert gate_blocks.in_equal_blocks(torch.neg, z[:0]).shape == (0, columns)


def test_without_it_they_differ():
    """So that the test above would see rows that are few, and those of torch's products."""
    experts = layer("plain", BF16)
    up, down = adapters(experts, BF16)
    whole, one = (some(experts, up, down, None, 0, count, BF16) for count in (TOKENS, 1))
    assert any(not torch.equal(of_all[:1], own) for of_all, own in zip(whole, one, strict=True))

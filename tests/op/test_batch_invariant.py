"""`lora_ext.batch_invariant`: a row of y and dX has the same bits in a batch of any size.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

import asyncio
import gc
import itertools
import threading
from dataclasses import replace

import op_calls
import pytest
import torch
import torch.nn as nn
from helpers import BF16, DTYPE_PAIRS, F32, F64, Problem, make_problem, pair_id, products_alike_from
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from quantized_helpers import quantized_rows

import lora_ext
from lora_ext import _C, LoraConfig, batch_invariant, invariance
from lora_ext.invariance import is_on

ROWS = 2048
HAS_AMX = "amx" in _C.available_cpu_isas()


def part(problem: Problem, first: int, rows: int, dropout_p: float = 0.0):
    """(y, a function that returns dX) of some rows."""
    where = slice(first, first + rows)
    x = problem.x[where].clone().requires_grad_()
    rest = (problem.bias, problem.scaling, dropout_p)
    y = lora_ext.lora_linear(x, problem.weight, problem.lora_a, problem.lora_b, *rest)
    return y, lambda: torch.autograd.grad(y, x, problem.grad[where])[0]


def both(problem: Problem, first: int, rows: int):
    y, dx = part(problem, first, rows)
    return y, dx()


@pytest.mark.slow
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 130)),
    parts=st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 100)), min_size=4),
    long=st.tuples(st.integers(0, ROWS - 1), st.integers(101, ROWS)),
    threads=st.sampled_from([1, 2]),
)
# In F.linear these rows have other bits than in a large batch.
@example((256, 384, 16), [(7, 1), (40, 2), (100, 7), (3, 33)], (0, 500), 1)
@example((1024, 64, 40), [(0, 1), (31, 1), (32, 1)], (1000, 1000), 2)
# dS of six columns is a narrow product, whose bits a dX of one column in a half type hides mostly.
@example((1, 105, 6), [(561, 2)], (0, 101), 1)
# Of rank 1 the trial's update was so large that it hid the roundings of W's product.
@example((33, 175, 1), [(5, 3)], (1, 101), 1)
def test_a_row_has_the_same_bits_in_any_batch(isa, pair, sizes, parts, long, threads):
    torch.set_num_threads(threads)
    problem = make_problem(ROWS, *sizes, pair)
    with batch_invariant():
        y, dx = both(problem, 0, ROWS)
        for first, rows in [*parts, long]:
            own_y, own_dx = both(problem, first, rows)
            assert torch.equal(own_y, y[first : first + rows]), (first, rows)
            assert torch.equal(own_dx, dx[first : first + rows]), (first, rows)


def test_without_it_they_differ():
    """So that the test above would see a block that is not one."""
    problem = make_problem(ROWS, 256, 384, 16, (F32, F32))
    y, dx = both(problem, 0, ROWS)
    own_y, own_dx = both(problem, 7, 1)
    assert not (torch.equal(own_y, y[7:8]) and torch.equal(own_dx, dx[7:8]))


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("rows", [0, 1, 32, 75])
def test_it_computes_the_same(isa, pair, rows):
    """With dropout, whose mask goes on from block to block, and all gradients."""
    problem = make_problem(rows, 70, 90, 9, pair)
    runs = []
    for mode in (False, True):
        leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
        bias = problem.bias.clone().requires_grad_()
        torch.manual_seed(5)
        with batch_invariant(mode):
            y = lora_ext.lora_linear(leaves[0], problem.weight, *leaves[1:], bias, 0.7, 0.4)
        runs.append((y, *torch.autograd.grad(y, (*leaves, bias), problem.grad)))
    bound = 1e-2 if pair[0].itemsize == 2 else 1e-5
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=2 * bound)


@pytest.mark.parametrize("pair", [(F64, F64), (F32, F32), (BF16, F32)], ids=pair_id)
def test_rows_at_an_offset_have_their_own_mask(isa, pair):
    """Where blocks or panels make y and dX: a part whose mask begins at its first row."""
    problem = make_problem(120, 70, 90, 9, pair)
    seed = torch.tensor(1)

    def of(first: int):
        x = problem.x[first:].clone().requires_grad_()
        rest = (problem.bias, problem.scaling, 0.4, seed, first, 0, False, None, None, 32)
        y = op_calls.lora_linear(x, problem.weight, problem.lora_a, problem.lora_b, *rest)
        return y, torch.autograd.grad(y, x, problem.grad[first:])[0]

    whole, part = of(0), of(41)
    for own, one in zip(whole, part, strict=True):
        assert torch.equal(own[41:], one)


def test_each_layout_of_a_weight_is_tried_once():
    """torch's products may differ with it: before the first call of a kind one block is tried."""
    problem = make_problem(40, 37, 53, 3, (F64, F64))
    wide = torch.zeros(53, 40, dtype=F64)[:, :37].copy_(problem.weight)

    def trials(weight):
        with batch_invariant(), torch.autograd.profiler.profile() as profile:
            both(replace(problem, weight=weight), 0, 40)
        return [event.name for event in profile.function_events].count("aten::sin_")

    for weight in (problem.weight, problem.weight.t().contiguous().t(), wide):
        assert trials(weight) > 0 and trials(weight) == 0


@pytest.mark.parametrize("least", [16, 64, None])
def test_operands_are_filled_up_until_rows_are_alike(least):
    """Also after a weight of zeros, which shows nothing of its products."""
    size = 41 if least is None else 41 + least // 16  # of no other test: what was tried is kept
    problem = make_problem(40, size, 59, 5, (F64, F64))
    wanted = both(problem, 0, 40)
    with products_alike_from(least), batch_invariant():
        if least is None:
            tried = rf"zeros: \[{size}, 59, 16\] \[{size}, 59, 32\].*\[64, 64, 64\];"
            with pytest.raises(NotImplementedError, match=tried):
                part(problem, 0, 40)
            return
        both(replace(problem, weight=torch.zeros_like(problem.weight)), 0, 40)
        whole, own = both(problem, 0, 40), both(problem, 7, 20)
    for each, rows in zip(whole, own, strict=True):
        assert torch.equal(each[7:27], rows)
    torch.testing.assert_close(whole, wanted, rtol=1e-9, atol=1e-9)


def test_dx_follows_the_forward_in_any_thread():
    problem = make_problem(ROWS, 256, 384, 16, (F32, F32))
    found = []
    with batch_invariant():
        _, whole = part(problem, 0, ROWS)
        _, own = part(problem, 7, 1)
    thread = threading.Thread(target=lambda: found.append(own()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], whole()[7:8])


# ---- the switch ----


def test_blocks_nest_and_a_call_holds_for_the_process():
    seen = []

    def look() -> bool:
        thread = threading.Thread(target=lambda: seen.append(is_on()))
        thread.start()
        thread.join()
        return seen[-1]

    assert not is_on()
    with batch_invariant():
        assert is_on()
        assert not look(), "a block is its thread's"
        with batch_invariant(False):
            assert not is_on()
            with batch_invariant(True):
                assert is_on()
            assert not is_on()
        assert is_on()
    with pytest.raises(KeyError), batch_invariant():
        raise KeyError
    assert not is_on()
    assert not look(), "what a block was given is not the process's"
    try:
        batch_invariant(True)
        assert is_on()
        assert look()
        with batch_invariant(False):
            assert not is_on()
            assert look(), "nor is this"
        assert is_on()
    finally:
        batch_invariant(False)
    assert not is_on()
    assert not look()
    with pytest.raises(TypeError, match="expected True or False, but got 1"):
        batch_invariant(1)


def test_blocks_of_tasks_overlap():
    """Each has its own, whoever ends first; what torch.compile reads is the thread's."""

    async def task(mode: bool, turns: int) -> list[bool]:
        with batch_invariant(mode):
            seen = []
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(is_on())
        return seen

    async def all_of_them():
        return await asyncio.gather(task(True, 2), task(False, 5), task(True, 4))

    assert asyncio.run(all_of_them()) == [[True] * 2, [False] * 5, [True] * 4]
    assert not is_on()


def test_the_block_of_an_async_generator_ends_with_it_alone():
    """It shares its caller's context, and is closed by a task of its own where it was left."""

    async def numbers(mode=True):
        with batch_invariant(mode):
            yield 0
            yield 1

    async def turns():
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)

    async def left() -> list[bool]:
        async for _ in numbers():
            break
        await turns()
        seen = [is_on()]
        with batch_invariant():
            async for _ in numbers(False):
                break
            await turns()
            seen.append(is_on())
        return [*seen, is_on()]

    async def closed(in_a_task: bool) -> list[bool]:
        other = numbers()
        await other.__anext__()
        with batch_invariant(False):
            with batch_invariant():
                closing = other.aclose()
                await (asyncio.create_task(closing) if in_a_task else closing)
                seen = [is_on()]
            seen.append(is_on())
        return [*seen, is_on()]

    async def child() -> bool:
        await turns()
        return is_on()

    async def outlived() -> list[bool]:
        with batch_invariant():
            task = asyncio.create_task(child())
        return [await task, is_on()]

    assert asyncio.run(left()) == [False, True, False]
    assert asyncio.run(closed(False)) == asyncio.run(closed(True)) == [True, False, False]
    assert asyncio.run(outlived()) == [True, False]
    assert not is_on() and not getattr(invariance._thread, "mode", None)


@pytest.mark.slow
def test_compiled(counter, forget_graphs):
    """The switch is guarded, and dX follows the forward."""
    problem = make_problem(ROWS, 256, 384, 16, (F32, F32))
    rest = (problem.weight, problem.lora_a, problem.lora_b)
    call = torch.compile(lambda x: lora_ext.lora_linear(x, *rest), backend=counter, fullgraph=True)

    def run(rows: int):
        x = problem.x[7 : 7 + rows].clone().requires_grad_()
        with batch_invariant():
            y = call(x)
        return y, torch.autograd.grad(y, x, problem.grad[7 : 7 + rows])[0]

    call(problem.x[:3])
    whole, own = run(1000), run(1)
    for all_rows, row in zip(whole, own, strict=True):
        assert torch.equal(all_rows[:1], row)


# ---- what it does not take ----


def refused(what: str):
    return pytest.raises(NotImplementedError, match=f"batch_invariant: expected .*but got {what}")


def test_a_weight_that_is_too_deep_for_panels():
    """Its rows are multiplied in equal blocks. Without them the bits of these rows differ."""
    problem = make_problem(5, (1 << 22) + 1, 1, 1, (F32, F32), bias=False)
    with batch_invariant(), torch.no_grad():
        one, all_rows = (
            lora_ext.lora_linear(problem.x[:rows], *problem.operands[1:]) for rows in (1, 5)
        )
    assert torch.equal(one, all_rows[:1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_quantised_weight(dtype):
    """Dequantised, it is a weight as any other, also for a few rows."""
    problem = make_problem(200, 70, 90, 9, (dtype, dtype))
    problem = replace(problem, weight=quantized_rows(problem.weight.float()))
    with batch_invariant():
        y, dx = both(problem, 0, 200)
        for first, rows in [(0, 1), (3, 7), (31, 33), (50, 130)]:
            own_y, own_dx = both(problem, first, rows)
            assert torch.equal(own_y, y[first : first + rows]), (first, rows)
            assert torch.equal(own_dx, dx[first : first + rows]), (first, rows)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("is_quantised", [False, True])
def test_an_adapter_for_each_row(isa, pair, is_quantised):
    """Whatever other rows there are, of its adapter and of others; up to 32 rows an adapter's
    factors are read otherwise where bits do not count."""
    if isa in ("library", "portable") or _C.cpu_panels(pair[0], batch_invariant=True) is None:
        assert isa in ("library", "portable", "amx") or pair[0] is F64 or HAS_AMX
        with batch_invariant(), pytest.raises(NotImplementedError, match="by panels"):
            of_rows(make_problem(4, 8, 6, 2, pair), torch.arange(4), False)
        return
    problem = make_problem(300, 70, 90, 9, pair)
    with batch_invariant():
        y, dx = of_rows(problem, torch.arange(300), is_quantised)
        for rows in (torch.tensor([7]), torch.arange(3, 12), torch.arange(0, 300, 3)):
            own_y, own_dx = of_rows(problem, rows, is_quantised)
            assert torch.equal(own_y, y[rows])
            assert torch.equal(own_dx, dx[rows])
        check_alone(problem, is_quantised)
    assert not torch.equal(y, of_rows(problem, torch.arange(300), is_quantised, 0)[0])


def check_alone(problem: Problem, is_quantised: bool) -> None:
    """A row has its bits of a call with its adapter alone: adapters take turns, in runs of any
    length, or one has all."""
    runs = torch.tensor([2, 0, 1, -1, 0, 2, 1]), torch.tensor([1, 70, 2, 3, 5, 90, 129])
    for count, p in itertools.product((1, 3, 31, 33, 300), (0.0, 0.4)):
        rows = torch.arange(count)
        for index in (rows % 4 - 1, runs[0].repeat_interleave(runs[1])[:count], 0 * rows):
            mixed = of_index(problem, rows, is_quantised, index.int(), p)
            for adapter in index.unique().clamp(0).tolist():
                alone = of_index(problem, rows, is_quantised, adapter, p)
                for own, one in zip(mixed, alone, strict=True):
                    assert torch.equal(own[index == adapter], one[index == adapter])


def of_rows(problem: Problem, rows: torch.Tensor, is_quantised: bool, shift: int = 1):
    """(y, dX) of some rows, each with one of three adapters or none."""
    return of_index(problem, rows, is_quantised, ((rows + shift) % 4 - 1).to(torch.int32))


def of_index(problem: Problem, rows, is_quantised: bool, index, dropout_p: float = 0.0):
    """The same by an index, or with the adapter of a number."""
    weight = quantized_rows(problem.weight.float()) if is_quantised else problem.weight
    a = [problem.lora_a[:rank] * scale for rank, scale in ((9, 1.0), (4, 0.5), (9, -1.0))]
    b = [problem.lora_b[:, :rank].contiguous() for rank in (9, 4, 9)]
    x, words = problem.x[rows].clone().requires_grad_(), {"seed": torch.tensor(3)}
    words |= {"bias": problem.bias, "dropout_p": dropout_p}
    one = isinstance(index, int)
    given = (a[index], b[index]) if one else (a, b)
    y = lora_ext.lora_linear(x, weight, *given, **words, **({} if one else {"index": index}))
    return y.detach(), torch.autograd.grad(y, x, problem.grad[rows])[0]


def test_the_rest_is_refused():
    problem = make_problem(4, 8, 6, 2)
    x, _, lora_a, lora_b = problem.operands
    index = torch.zeros(4, dtype=torch.int32)
    y = torch.zeros(4, 6)
    with batch_invariant():
        with refused("lora_update"):
            lora_ext.lora_update(y, x, lora_a, lora_b)
        with refused("lora_update"):
            lora_ext.lora_update(y, x, [lora_a], [lora_b], index=index)


def test_layers_are_taken_or_refused():
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 24), nn.Linear(24, 9))
    lora_ext.apply_lora(model, LoraConfig(["1"], r=4))
    lora_ext.apply_lora(model, LoraConfig(["1"], r=3), "other")
    lora_ext.set_adapter(model, ["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(9)
    with batch_invariant():
        x = model[0](torch.arange(2000) % 9)
        assert torch.equal(model[1](x)[:9], model[1](model[0](ids)))
        (layer,) = lora_ext.explain(model)
        assert layer.path == "fused"
        assert layer.reason.endswith("rank 7; batch-invariant")
    assert "batch-invariant" not in lora_ext.explain(model)[0].reason
    lora_ext.apply_lora(model, LoraConfig(["0"], r=4), "third")
    lora_ext.set_adapter(model, ["third"])
    with batch_invariant(), refused("an embedding"):
        model(ids)


def test_peft_is_taken_or_refused():
    peft = pytest.importorskip("peft")
    for use_dora in (False, True):
        base = nn.Sequential(nn.Linear(16, 24)).to(BF16)
        config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=use_dora)
        model = lora_ext.accelerate(peft.get_peft_model(base, config))
        nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        x = torch.randn(200, 16, dtype=BF16)
        with batch_invariant():
            if use_dora:
                with refused("DoRA"):
                    model(x)
            else:
                assert torch.equal(model(x)[3:4], model(x[3:4]))


@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_pefts_embeddings_are_refused(names):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(9, 16)), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(names)
    lora_ext.accelerate(model)
    with batch_invariant(), refused("(DoRA or )?an embedding"):
        model(torch.arange(9))

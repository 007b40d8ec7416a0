"""lora_linear with an adapter for each row: runs of adapters in any order, of any shape and dtype.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

import random
from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from helpers import BF16, DTYPE_PAIRS, F16, F32, F64
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from many_helpers import GRADIENTS, TENSORS, assert_equal, make_many, run, run_loop, sliced


@dataclass(frozen=True)
class Case:
    """runs: (adapter or -1, rows), in their order; an adapter beyond the ranks is the last. given:
    the dtype of a y in the place of a weight. strided: names of tensors that are slices."""

    runs: list[tuple[int, int]]
    ranks: list[int]
    pair: tuple[torch.dtype, torch.dtype] = (F32, F32)
    columns: tuple[int, int] = (70, 65)
    given: torch.dtype | None = None
    dropout_p: float = 0.0
    strided: Set[str] = frozenset()
    wanted: Set[str] = frozenset(GRADIENTS)
    shuffled: bool = False
    is_deep: bool = False  # x [1, rows, in]
    threads: int = 1


lengths = st.integers(1, 64) | st.sampled_from([1, 8, 16, 32, 64])
features = st.integers(1, 70) | st.just(128)
cases = st.builds(
    Case,
    st.lists(st.tuples(st.integers(-1, 5), lengths), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from(DTYPE_PAIRS),
    st.tuples(features, features),
    st.sampled_from([None, None, F64, F32, BF16, F16]),
    st.sampled_from([0.0, 0.5]),
    st.sets(st.sampled_from(TENSORS)),
    st.just(frozenset(GRADIENTS)) | st.sets(st.sampled_from(GRADIENTS)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
)
DESCENDING = Case([(1, 32), (0, 32)], [16, 4])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cases)
@example(DESCENDING)
@example(replace(DESCENDING, runs=[(2, 40), (-1, 3), (0, 9), (2, 1), (1, 64)], ranks=[3, 8, 40]))
@example(replace(DESCENDING, pair=(BF16, F32), strided={"bias", "lora_b"}, dropout_p=0.5))
@example(replace(DESCENDING, pair=(BF16, BF16), threads=2, shuffled=True))
@example(replace(DESCENDING, wanted=frozenset()))
def test_each_row_is_as_alone(isa, two_threads, case):
    """y and gradients of any runs, beside float64 of one adapter's rows after the other's."""
    numbers = [min(g, len(case.ranks) - 1) for g, count in case.runs for _ in range(count)]
    if case.shuffled:
        random.Random(0).shuffle(numbers)
    lead = (1, len(numbers)) if case.is_deep else len(numbers)
    many = make_many(lead, *case.columns, case.ranks, case.pair, given=case.given)
    index = torch.tensor(numbers, dtype=torch.int32).view(many.index.shape)
    many = replace(many, index=index)
    # A sum's rounding is a share of the sum of its terms' sizes.
    exact, sizes = (run_loop(m, case.dropout_p, dtype=F64) for m in (many, many.each(torch.abs)))
    torch.set_num_threads(case.threads)
    own = many.each(sliced, case.strided)
    ours = run(own, case.dropout_p, wanted=case.wanted)
    assert set(ours) == {"y"} | {n for n in exact if n[1:].split("[")[0] in case.wanted}
    for name, value in ours.items():
        share = {F64: 1e-12, F32: 2**-14}.get(value.dtype, 4 * torch.finfo(value.dtype).eps)
        assert ((value.double() - exact[name]).abs() <= share * sizes[name] + 1e-7).all(), name
    if numbers == sorted(numbers) and -1 not in numbers:
        offs = (index.view(-1)[None] <= torch.arange(len(case.ranks))[:, None]).sum(1).int()
        assert_equal(run(own, case.dropout_p, offs=offs, wanted=case.wanted), ours)

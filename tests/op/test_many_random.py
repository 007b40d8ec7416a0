"""lora_linear with an adapter for each row: runs of adapters in any order, of any shape and dtype.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

import random
from dataclasses import replace

import torch
from helpers import BF16, DTYPE_PAIRS, F16, F32, F64
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from many_helpers import GRADIENTS, TENSORS, assert_equal, make_many, run, run_loop, sliced

lengths = st.integers(1, 64) | st.sampled_from([1, 8, 16, 32, 64])
features = st.integers(1, 70) | st.just(128)
EVERY = frozenset(GRADIENTS)
DESCENDING = {"runs": [(1, 32), (0, 32)], "ranks": [16, 4], "pair": (F32, F32), "columns": (70, 65)}
DESCENDING |= {"y": None, "dropout_p": 0.0, "strided": {}, "wanted": EVERY, "shuffled": False}
DESCENDING |= {"frozen": frozenset(), "threads": 1}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    runs=st.lists(st.tuples(st.integers(-1, 5), lengths), max_size=8),  # an adapter or none, rows
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    pair=st.sampled_from(DTYPE_PAIRS),
    columns=st.tuples(features, features),
    y=st.sampled_from([None, None, F64, F32, BF16, F16]),  # one that is given, in this dtype
    dropout_p=st.sampled_from([0.0, 0.5]),
    strided=st.sets(st.sampled_from(TENSORS)),
    wanted=st.just(EVERY) | st.sets(st.sampled_from(GRADIENTS)),
    frozen=st.sets(st.integers(0, 5)),
    shuffled=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(**DESCENDING)
@example(**DESCENDING | {"runs": [(2, 40), (-1, 3), (0, 9), (2, 1), (1, 64)], "ranks": [3, 8, 40]})
@example(**DESCENDING | {"pair": (BF16, F32), "strided": {"bias", "lora_b"}, "dropout_p": 0.5})
@example(**DESCENDING | {"pair": (BF16, BF16), "threads": 2, "shuffled": True})
@example(**DESCENDING | {"wanted": set()})
@example(**DESCENDING | {"wanted": {"x", "lora_b"}, "frozen": {0}})
def test_each_row_is_as_alone(
    isa,
    two_threads,
    runs,
    ranks,
    pair,
    columns,
    y,
    dropout_p,
    strided,
    wanted,
    frozen,
    shuffled,
    threads,
):
    """y and gradients of any runs, beside float64 of one adapter's rows after the other's."""
    numbers = [min(g, len(ranks) - 1) for g, count in runs for _ in range(count)]
    if shuffled:
        random.Random(0).shuffle(numbers)
    lead = (1, len(numbers)) if len(runs) % 2 else len(numbers)
    many = make_many(lead, *columns, ranks, pair, given=y)
    index = torch.tensor(numbers, dtype=torch.int32).view(many.index.shape)
    many = replace(many, index=index)
    # A sum's rounding is a share of the sum of its terms' sizes: 2^-14 for some hundred terms of
    # float32, which may be pairs of bfloat16 terms.
    exact, sizes = (run_loop(m, dropout_p, dtype=F64) for m in (many, many.each(torch.abs)))
    torch.set_num_threads(threads)
    own = many.each(sliced, strided)
    ours = run(own, dropout_p, wanted=wanted, frozen=frozen)
    given = {n for n in exact if n[1:].split("[")[0] in wanted}
    assert set(ours) == {"y"} | {n for n in given if "[" not in n or int(n[8:-1]) not in frozen}
    for name, value in ours.items():
        share = {F64: 1e-12, F32: 2**-14}.get(value.dtype, 4 * torch.finfo(value.dtype).eps)
        assert ((value.double() - exact[name]).abs() <= share * sizes[name] + 1e-7).all(), name
    if numbers == sorted(numbers) and -1 not in numbers:
        offs = (index.view(-1)[None] <= torch.arange(len(ranks))[:, None]).sum(1).int()
        assert_equal(run(own, dropout_p, offs=offs, wanted=wanted, frozen=frozen), ours)

"""lora_linear with an adapter for each row, of any shape, ranks and index.

By itself: a machine with a GPU may lack hypothesis, and is to run the other tests.
"""

from dataclasses import replace

import torch
from helpers import F64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_helpers import KINDS, assert_equal, make_many, run, run_loop


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_ranks_and_index(isa, data):
    """Exact integers, in float32, whatever the shapes; as a list, as a pool, by index and offs."""
    rows = data.draw(st.integers(0, 40) | st.integers(90, 210))
    lead = data.draw(st.sampled_from([(rows,), (1, rows), (rows, 1)]))
    in_features, out_features = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    ranks = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    kind = data.draw(st.sampled_from(KINDS))
    dropout_p = data.draw(st.sampled_from([0.0, 0.5]))
    many = make_many(lead, in_features, out_features, ranks, kind=kind, integers=2)
    many = replace(many, x=many.x.clone())
    wanted = run_loop(many, dropout_p, dtype=F64)
    assert_equal(run(many, dropout_p), wanted)
    if kind in ("ranges", "one", "none") and (many.index >= 0).all():
        offs = (many.index.view(-1)[None] <= torch.arange(len(ranks))[:, None]).sum(1).int()
        assert_equal(run(many, dropout_p, offs=offs), wanted)

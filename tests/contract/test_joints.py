"""Each joint of a kind of layer, a way to run it and a change before that: y and all gradients are
those of the same layer in eager mode, without a checkpoint, on which nothing ran before.

`make test` has cells in which each two parts meet, few of those that compile; `make nightly` all.
"""

import itertools
import re
import warnings
from typing import NamedTuple

import pytest
import torch
from helpers import F32, F64, packable
from torch._dynamo.exc import Unsupported

import lora_ext
from contract.joint_ways import WAYS, Call, Way, around, call_of, run_all, two
from contract.joints import CALLS, CHANGES, DROPOUT, KINDS, dtype_of, make, written
from lora_ext.packing.layers import packable_layers

LATE = "written before backward"


class Refusal(NamedTuple):
    """What is an error with a cure, in all cells that three patterns match."""

    kind: str
    way: str
    change: str
    error: type[Exception]
    message: str


# The first that matches is the error of a cell.
REFUSALS = [
    Refusal("ours quantised", ".*", "merged", RuntimeError, "a dense weight to merge into"),
    # But of one call alone, whose block is the last.
    Refusal(".*", "tasks of a graph", f"(?!{LATE}).*", RuntimeError, "block was entered last"),
    # transformers' own forward
    Refusal("ours experts", ".*graph|compiled.*", "merged", Unsupported, "SourcelessBuilder"),
    Refusal(
        "(?!.*(embedding|quantised)).*", "(?!functional).*", LATE, RuntimeError, "an inplace operat"
    ),
]


def exists(kind, way, change):
    """What there is to test: a pool has no active adapters and nothing to merge, and is not in a
    state dict; a checkpoint repeats with the weight of then, as torch says; PEFT has the names, and
    draws masks of a batch's adapters in the order of a set of strings, which a graph has not."""
    return not (
        (kind.startswith("pool") and change in ("switched", "merged", "moved"))
        or ("router" in kind and change.startswith("dropout"))
        or (change == LATE and WAYS[way].repeats)
        or ("names" in way and not kind.startswith("peft"))
        or (kind == "peft conv2d" and WAYS[way].graph and change == "dropout on")
    )


CELLS = [cell for cell in itertools.product(KINDS, WAYS, CHANGES) if exists(*cell)]


def covering():
    """Few cells that have each pair of parts that any has, and rather what takes less time; each
    kind of layer is compiled, two of them in all ways."""

    def cost(cell):
        return ("linear" not in cell[0]) + ("experts" in cell[0]) + 3 * bool(WAYS[cell[1]].graph)

    def pairs_of(cell):
        if WAYS[cell[1]].graph and cell[1] != "compiled":
            return {cell[:2]} if cell[0] in ("ours linear", "peft linear") else set()
        return set(itertools.combinations(enumerate(cell), 2))

    pairs = {cell: pairs_of(cell) for cell in CELLS}
    found, seen = set(), set()
    for new in (3, 2, 1):
        for cell in sorted(CELLS, key=cost):
            if len(pairs[cell] - seen) >= new:
                seen |= pairs[cell]
                found.add(cell)
    return found


EVERYDAY = covering()


def check(found, wanted):
    """A gradient that is not there is zero."""
    for name in found.keys() | wanted.keys():
        one, other = (step.get(name, torch.zeros(())) for step in (found, wanted))
        tolerance = 1e-9 if one.dtype == F64 else 1e-4
        limit = tolerance * max(1.0, other.abs().max().item())
        assert (one - other).abs().max().item() <= limit, name


def run_cell(kind, way, change):
    own, way = dtype_of(kind), WAYS[way]
    live, fresh = (make(kind, DROPOUT * change.startswith("dropout")) for _ in range(2))
    if change == "dropout on":
        CHANGES["dropout off"](live)
    if "packed" in kind:
        for layer in packable_layers(live.model):
            layer.packed = lora_ext.pack_weight(layer.packable().weight, backward=True)
    forward, plain = call_of(live, way), Way(two if way.part is two else around)

    def run(calls, dtype=own, **words):
        found = run_all(way, [Call(live, forward, way, *call, dtype, **words) for call in calls])
        wanted = [Call(fresh, fresh.model, plain, *call, dtype).run() for call in calls]
        for steps in zip(found, wanted, strict=False):  # tasks have a block each
            check(*steps)
        return wanted

    Call(live, forward, way, way.first, None, own).run()
    later = [CHANGES[change](subject) for subject in (live, fresh)]
    if later[0]:
        run([(None, None)], {F64: F32, F32: F64}[own] if change == "cast" else own)
        for each in later:
            each()
    if change == LATE:
        run(CALLS[:1], between=written)
    else:
        first, second, third = (step["y"] for step in run(CALLS))
        assert not (torch.equal(first, second) or torch.equal(first, third))


@pytest.mark.parametrize(
    ("kind", "way", "change"),
    [
        pytest.param(
            *cell, id=", ".join(cell), marks=() if cell in EVERYDAY else pytest.mark.nightly
        )
        for cell in CELLS
    ],
)
def test_a_joint(forget_graphs, kind, way, change):
    if "packed" in kind and not packable(F32):
        pytest.skip("this torch has no oneDNN")
    refusals = [each for each in REFUSALS if all(map(re.fullmatch, each[:3], (kind, way, change)))]
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):
        warnings.simplefilter("ignore")
        if not refusals:
            run_cell(kind, way, change)
            return
        refusal = refusals[0]
        with pytest.raises(refusal.error, match=refusal.message):
            run_cell(kind, way, change)


def test_no_refusal_is_added_unseen():
    assert len(REFUSALS) == 4

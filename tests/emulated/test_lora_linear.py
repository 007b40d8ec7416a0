"""The whole op in emulation: plans, every kernel in its order, one workspace of planned size."""

from collections import Counter

import pytest

from emulated import programs
from emulator import run

pytestmark = pytest.mark.kernels

PROGRAM = "lora_linear_sequence"
FEW, MANY = {"plain": 36, "race": 9, "asan": 3}, {"plain": 160, "race": 40, "asan": 24}

# Sizes where T is made in the grid of the product, or where rings of stages go round often: more
# seeds of them, and how many of their runs, in all, have plans of each kind at least.
SIZES = ("fused_shrink_deep", "fused_shrink_wide", "laps")
FEW_OF_SIZES, MANY_OF_SIZES = {"plain": 24, "race": 3}, {"plain": 24, "race": 12}
KINDS = {
    "forward, fused shrink": 10,
    "forward, fused shrink, an empty row block": 10,
    "forward, fused shrink, more depth than columns": 5,
    "forward, fused shrink, more columns than depth": 5,
    "forward, fused shrink, more than 3 clusters": 5,
    "forward, dropout keeps T out of the grid": 5,
    "forward, rank above that of fused shrink": 2,
    "forward, pingpong laps": 5,
    "forward, columns of a shard": 3,
    "backward, fused shrink": 10,
    "backward, fused shrink, an empty row block": 10,
    "backward, fused shrink, more depth than columns": 5,
    "backward, fused shrink, more columns than depth": 5,
    "backward, fused shrink, more than 3 clusters": 3,
    "backward, fused shrink, masked": 5,
    "backward, fused shrink, early": 10,
    "backward, fused shrink, late": 2,
    "backward, rank above that of fused shrink": 5,
    "backward, pingpong laps": 5,
    "backward, columns of a shard": 3,
    "fused shrink, in a used workspace": 10,
}


def failures(runs: list[run.Run]) -> list[str]:
    return [each.describe() for each in runs if each.outcome != "clean"]


@pytest.fixture
def program(flavour):
    programs.build_programs([(flavour, PROGRAM)])


@pytest.mark.parametrize("flavour", FEW)
def test_forward_and_backward_are_right(program, flavour, seeds):
    chosen = seeds.range(FEW[flavour], MANY[flavour])
    assert failures(run.run_seeds(flavour, PROGRAM, chosen)) == []


@pytest.mark.parametrize("flavour", FEW_OF_SIZES)
def test_products_that_make_t_and_long_walks_are_right(program, flavour, seeds):
    each_size = seeds.choose(FEW_OF_SIZES[flavour], MANY_OF_SIZES[flavour])
    runs = []
    for size in SIZES:
        runs += run.run_seeds(flavour, PROGRAM, f"1:{1 + each_size}", "--size", size)
    assert failures(runs) == []
    assert len(runs) == len(SIZES) * each_size
    counts = Counter(fact for each in runs for fact in set(each.case["facts"]))
    # The race checker runs the first of the same seeds.
    least = KINDS if flavour == "plain" else {}
    rare = {kind: counts[kind] for kind in least if counts[kind] < least[kind]}
    assert rare == {}, "too few plans of these kinds: draw them more often"


@pytest.mark.parametrize("flavour", ["plain"])
def test_integers_are_exact_at_every_rank(program, flavour):
    assert failures(run.run_seeds(flavour, PROGRAM, "1:258", "--size", "every_rank")) == []


@pytest.mark.parametrize("flavour", ["plain"])
@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_rounding_the_adapters_is_caught(program, flavour, variant):
    arguments = ("--seeds", "1:40", "--variant", variant, "--fault", "halves.low")
    [failure] = failures(run.run_program(flavour, PROGRAM, *arguments))
    assert failure.startswith("result")

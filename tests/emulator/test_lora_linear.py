"""The whole op in emulation: plans, every kernel in its order, one workspace of planned size."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from emulator import build, run

pytestmark = pytest.mark.kernels

PROGRAM = "lora_linear_sequence"
SEEDS = {"plain": 160, "race": 40, "asan": 24}

# Sizes where T is made in the grid of the product, or where rings of stages go round often: more
# seeds of them, and how many of their runs, in all, have plans of each kind at least.
SIZES = ("in_grid_deep", "in_grid_wide", "laps")
SEEDS_OF_SIZES = {"plain": 24, "race": 12}
KINDS = {
    "forward, in grid": 10,
    "forward, in grid, an empty row block": 10,
    "forward, in grid, more depth than columns": 5,
    "forward, in grid, more columns than depth": 5,
    "forward, in grid, more than 3 clusters": 5,
    "forward, dropout keeps T out of the grid": 5,
    "forward, rank above that of in grid": 2,
    "forward, pingpong laps": 5,
    "forward, columns of a shard": 3,
    "backward, in grid": 10,
    "backward, in grid, an empty row block": 10,
    "backward, in grid, more depth than columns": 5,
    "backward, in grid, more columns than depth": 5,
    "backward, in grid, more than 3 clusters": 3,
    "backward, in grid, masked": 5,
    "backward, in grid, early": 10,
    "backward, in grid, late": 2,
    "backward, rank above that of in grid": 5,
    "backward, pingpong laps": 5,
    "backward, columns of a shard": 3,
    "in grid, in a used workspace": 10,
}


@pytest.fixture(scope="module")
def program():
    build.build_programs([(flavour, build.source_of(PROGRAM)) for flavour in SEEDS])


def failures(flavour: str, *arguments: str) -> list[str]:
    runs = run.run_program(flavour, PROGRAM, *arguments)
    return [each.describe() for each in runs if each.outcome != "clean"]


@pytest.mark.parametrize("flavour", SEEDS)
def test_forward_and_backward_are_right(program, flavour):
    assert failures(flavour, "--seeds", f"1:{1 + SEEDS[flavour]}") == []


@pytest.mark.parametrize("flavour", SEEDS_OF_SIZES)
def test_products_that_make_t_and_long_walks_are_right(program, flavour):
    seeds = f"1:{1 + SEEDS_OF_SIZES[flavour]}"

    def run_size(size: str) -> list[run.Run]:
        return run.run_program(flavour, PROGRAM, "--seeds", seeds, "--size", size)

    with ThreadPoolExecutor(build.JOBS) as pool:
        runs = [each for some in pool.map(run_size, SIZES) for each in some]
    assert [each.describe() for each in runs if each.outcome != "clean"] == []
    assert len(runs) == len(SIZES) * SEEDS_OF_SIZES[flavour]
    counts = Counter(fact for each in runs for fact in set(each.case["facts"]))
    # The race checker runs the first half of the same seeds.
    least = {kind: least if flavour == "plain" else 1 for kind, least in KINDS.items()}
    rare = {kind: counts[kind] for kind in KINDS if counts[kind] < least[kind]}
    assert rare == {}, "too few plans of these kinds: draw them more often"


def test_integers_are_exact_at_every_rank(program):
    assert failures("plain", "--seeds", "1:258", "--size", "every_rank") == []


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_rounding_the_adapters_is_caught(program, variant):
    arguments = ("--seeds", "1:40", "--variant", variant, "--fault", "halves.low")
    [failure] = failures("plain", *arguments)
    assert failure.startswith("result")

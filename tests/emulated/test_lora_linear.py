"""The whole op in emulation: plans, every kernel in its order, one workspace of planned size."""

from collections import Counter

import pytest

from emulated import programs
from emulator import run

pytestmark = pytest.mark.kernels

PROGRAM = "lora_linear_sequence"
FEW, MANY = {"plain": 36, "race": 9, "asan": 3}, {"plain": 160, "race": 40, "asan": 24}

# The size where rings of stages go round often: more seeds of it, and how many of its runs have
# plans of each kind at least.
FEW_OF_LAPS, MANY_OF_LAPS = {"plain": 24, "race": 3}, {"plain": 24, "race": 12}
KINDS = {
    "forward, cooperative laps": 5,
    "forward, pingpong laps": 5,
    "forward, columns of a shard": 2,
    "backward, cooperative laps": 5,
    "backward, pingpong laps": 5,
    "backward, columns of a shard": 2,
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


@pytest.mark.parametrize("flavour", FEW_OF_LAPS)
def test_long_walks_are_right(program, flavour, seeds):
    count = seeds.choose(FEW_OF_LAPS[flavour], MANY_OF_LAPS[flavour])
    runs = run.run_seeds(flavour, PROGRAM, f"1:{1 + count}", "--size", "laps")
    assert failures(runs) == []
    assert len(runs) == count
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

"""The whole op in emulation: plans, every kernel in its order, one workspace of planned size."""

import pytest

from emulator import build, run

pytestmark = pytest.mark.kernels

PROGRAM = "lora_linear_sequence"
SEEDS = {"plain": 200, "race": 60, "asan": 30}


@pytest.fixture(scope="module")
def program():
    build.build_programs([(flavour, build.source_of(PROGRAM)) for flavour in SEEDS])


def failures(flavour: str, *arguments: str) -> list[str]:
    runs = run.run_specimen(flavour, PROGRAM, *arguments)
    return [each.describe() for each in runs if each.outcome != "clean"]


@pytest.mark.parametrize("flavour", SEEDS)
def test_forward_and_backward_are_right(program, flavour):
    assert failures(flavour, "--seeds", f"1:{1 + SEEDS[flavour]}") == []


def test_integers_are_exact_at_every_rank(program):
    assert failures("plain", "--seeds", "1:258", "--size", "every_rank") == []


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_rounding_the_adapters_is_caught(program, variant):
    arguments = ("--seeds", "1:40", "--variant", variant, "--fault", "halves.low")
    [failure] = failures("plain", *arguments)
    assert failure.startswith("result")

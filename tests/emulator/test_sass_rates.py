"""The planner's table of main loops is what was recorded of them (scripts/sass_rates.py)."""

import re
import sys

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import sass_baseline
import sass_rates

pytestmark = pytest.mark.kernels


def test_the_header_is_what_was_recorded():
    assert sass_rates.HEADER.read_text() == sass_rates.header(sass_baseline.read())


def test_its_tiles_are_those_of_the_planner():
    plan = (build.ROOT / "csrc" / "plan" / "plan.h").read_text()
    tiles = re.findall(r'\{Tile::k\w+, "([^"]+)"', plan)
    assert tiles == [*sass_rates.TILES, "decode"]  # which goes by its step


def test_every_tile_has_a_rate_where_it_can_run():
    recorded = sass_baseline.read()
    for tile, family in sass_rates.TILES.items():
        for section, runs in (("sm_80", "sm90a" not in family), ("sm_90a", True)):
            for masked in (False, True):
                rate = sass_rates.rate(recorded[section], family, masked)
                assert (rate > 0.2) == runs, (tile, section, masked)
    on_consumer_cards = recorded[sass_baseline.ON_CONSUMER_CARDS]
    assert sass_rates.rate(on_consumer_cards, "lora_gemm 128x64", False) > 0.2
    assert sass_rates.rate(on_consumer_cards, "lora_gemm 128x256", False) == 0


@pytest.mark.parametrize(
    ("section", "family", "masked", "least"),
    [
        ("sm_80", "lora_gemm 128x256", False, 0.90),
        ("sm_80", "lora_gemm 128x128", False, 0.90),
        ("sm_80", "lora_gemm 128x256", True, 0.85),
        ("sm_80", "lora_gemm 128x128", True, 0.85),
        (sass_baseline.ON_CONSUMER_CARDS, "lora_gemm 128x128x3", False, 0.90),
        ("sm_90a", "lora_gemm_sm90a 128x256", False, 1.0),
    ],
)
def test_large_tiles_reach_what_they_are_to(section, family, masked, least):
    assert sass_rates.rate(sass_baseline.read()[section], family, masked) >= least


def test_a_tile_goes_by_its_slowest_instance():
    recorded = {
        "lora_gemm 128x64": [[100.0, 0.5]],
        "lora_gemm 128x64 MN-major": [[100.0, 0.4]],
        "lora_gemm 128x64 MN-major masked": [[100.0, 0.3]],
        "lora_gemm 128x64 element": [[100.0, 0.2]],  # not the planner's tile
        "lora_gemm_sm90a 128x128 tail 4": [[100.0, 0.7], [30.0, 0.1], [101.0, 0.69]],
        "lora_gemm_sm90a 128x128 pingpong tail 4": [[100.0, 0.6]],
    }
    rate = sass_rates.rate
    assert rate(recorded, "lora_gemm 128x64", False) == 0.4
    assert rate(recorded, "lora_gemm 128x64", True) == 0.3
    assert rate(recorded, "lora_gemm_sm90a 128x128", False) == 0.69  # of those over k
    assert rate(recorded, "lora_gemm_sm90a 128x128 pingpong", False) == 0.6
    assert rate(recorded, "lora_gemm 128x256", False) == 0.0


def test_the_library_goes_by_what_is_published():
    # 235.1 of 311.9 TFLOP/s; 13.5 x 32 tiles of 14 x 32 are whole, in 5 waves of 108.
    assert sass_rates.library("A100") == pytest.approx(0.7539 / 0.8, rel=1e-3)
    assert sass_rates.library("L40S") == sass_rates.library("A100")
    assert sass_rates.library("H100") == 1.0


def test_a_step_of_few_rows_is_that_of_the_slowest_instance():
    recorded = {
        "lora_decode 8": [[620.0, 0.10], [4900.0, 0.02]],
        "lora_decode fp16 float 8": [[705.0, 0.09], [2700.0, 0.03]],
        "lora_decode 64": [[1360.0, 0.38]],
    }
    assert sass_rates.decode_us(recorded, 8, 1.41) == pytest.approx(0.5)
    assert sass_rates.decode_us(recorded, 64, 1.36) == pytest.approx(1.0)
    assert sass_rates.step_of("lora_gemm", [[620.0, 0.10], [4900.0, 0.02]])[0] == 4900.0


def test_the_steps_of_few_rows_are_those_of_the_plan():
    plan = (build.ROOT / "csrc" / "plan" / "decode_plan.h").read_text()
    tiles = plan.split("kDecodeTiles[] = {")[1].split(";")[0]
    assert tuple(map(int, re.findall(r"\{(\d+), ", tiles))) == sass_rates.BATCHES

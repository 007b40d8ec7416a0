"""Writes the planner's table of main loops, csrc/plan/main_loop_rates.h, from what was recorded.

For each tile of kTiles (csrc/plan/plan.h) and each card that loops are replayed on: the share of
the tensor rate that lora_gemm's loop over k reaches, the lowest among its instances, without and
with a mask. And the same of the library: on mma.sync the rate that is published of CUTLASS'
kernel with the largest tile (scripts/published_loops.json), less its last wave, which is not full;
on wgmma the most that a loop can reach. Of the kernels of few columns the same share, without and
with a mask. Of lora_decode, which nothing but DRAM should hold up, the time of a step.
"""

from pathlib import Path

from sass_pipes import CARDS
from sass_published import read

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "plan" / "main_loop_rates.h"
LIBRARY = "CUTLASS 256x128_32x3_nn"
# A tile's name in kTiles, and the families of kernels that have it, less tail, layout and mask.
TILES = {
    "128 x 256": "lora_gemm 128x256",
    "128 x 128": "lora_gemm 128x128",
    "deep 128 x 128": "lora_gemm 128x128x3",
    "128 x 64": "lora_gemm 128x64",
    "in-grid 128 x 256": "lora_gemm_in_grid_sm90a 128x256",
    "in-grid 128 x 128": "lora_gemm_in_grid_sm90a 128x128",
    "wgmma 128 x 256": "lora_gemm_sm90a 128x256",
    "wgmma 128 x 128": "lora_gemm_sm90a 128x128",
    "pingpong 128 x 192": "lora_gemm_sm90a 128x192 pingpong",
    "pingpong 128 x 128": "lora_gemm_sm90a 128x128 pingpong",
}
WORDS = {"fp16", "MN-major", "masked", "tail", "1", "2", "4"}  # of an instance of such a family
# Which recorded loops stand for a card, and the clock in GHz at which vendors' tensor rates are.
RECORDED = {"A100": "sm_80", "L40S": "sm_80 on L40S", "H100": "sm_90a"}
CLOCKS = {"A100": 1.41, "L40S": 2.52, "H100": 1.83}
# Kernels of few columns, which were replayed on an A100 and an H100; on an L40S their loops wait
# for a memory of less than half an A100's speed.
SKINNY = {"A100": "sm_80", "L40S": "sm_80", "H100": "sm_90a"}
BATCHES = (8, 16, 32, 64)  # kDecodeTiles (csrc/plan/decode_plan.h)


def over_k(loops: list[list[float]]) -> list[float]:
    """The slowest of those loops of a kernel that multiply most in a step: its cycles and share.

    Others make T, in whose steps there are fewer columns.
    """
    most = max(cycles * efficiency for cycles, efficiency in loops)
    of_k = [[cycles, share] for cycles, share in loops if cycles * share > 0.99 * most]
    return min(of_k, key=lambda loop: loop[1])


def step_of(family: str, loops: list[list[float]]) -> list[float]:
    """The loop that a kernel is known by: its cycles and share.

    Other loops of lora_decode multiply by B at a tile's end, each product behind its loads.
    """
    return max(loops, key=lambda loop: loop[1]) if "lora_decode" in family else over_k(loops)


def shares(
    recorded: dict[str, list[list[float]]], family: str, masks: set[bool], words: set[str] = WORDS
) -> list[float]:
    """What a tile's instances reach."""
    found = []
    for name, loops in recorded.items():
        more = set(name.removeprefix(family).split())
        alike = name == family or name.startswith(f"{family} ")
        if alike and more <= words and ("masked" in more) in masks:
            found.append(over_k(loops)[1])
    return found


def rate(recorded: dict[str, list[list[float]]], family: str, masked: bool) -> float:
    """The lowest among a tile's instances; 0 if there are none."""
    return min(shares(recorded, family, {masked}), default=0.0)


def decode_us(recorded: dict[str, list[list[float]]], batch: int, ghz: float) -> float:
    """A step by all blocks of an SM that are resident, of the slowest of a batch's instances."""
    steps = [
        step_of(name, loops)[0]
        for name, loops in recorded.items()
        if name.startswith("lora_decode ") and name.endswith(f" {batch}")
    ]
    return max(steps) / ghz / 1e3


def skinny(recorded: dict[str, list[list[float]]]) -> str:
    """The lines of the kernels of few columns."""
    lines = []
    for family in ("lora_shrink", "lora_wgrad"):
        plain, masked = (rate(recorded, family, each) for each in (False, True))
        lines.append(f"    {{{plain:.3f}, {masked:.3f}}},  // {family}")
    dsdb = ", ".join(f"{rate(recorded, f'lora_dsdb {each}', False):.3f}" for each in (16, 32))
    lines.append(f"    {{{dsdb}}},  // lora_dsdb")
    return "\n".join(lines)


def library(card: str) -> float:
    if CARDS[card].wgmma_products:
        return 1.0
    [entry] = [each for each in read() if each["name"] == LIBRARY]
    (m, n, _), (rows, columns), sms = entry["problem"], entry["tile"], CARDS[entry["card"]].sms
    waves = -(-(-(-m // rows) * -(-n // columns)) // sms)
    return entry["published"] * waves * sms * rows * columns / (m * n)


HEAD = """// Written by `python scripts/sass.py --record` (scripts/sass_rates.py): what main loops
// reach of the tensor rate, replayed from the machine code of nvcc {nvcc} (docs/main_loops.md).
#pragma once

namespace lora_ext::plan {{

// Of lora_gemm's loop over k; 0 where there is no such kernel.
struct MainLoopRate {{
  double plain, masked;
}};
// On one card: of the library's kernels, of those of kTiles, in its order, and of the kernels of
// few columns, lora_dsdb's of 16 and of 32; and microseconds of a step of lora_decode, of all
// blocks that an SM has, for each of kDecodeTiles.
struct MainLoopRates {{
  double library;
  MainLoopRate tiles[{tiles}];
  MainLoopRate shrink, wgrad;
  double dsdb[2];
  double decode_us[{batches}];
}};
"""
CARD = """
constexpr MainLoopRates kMainLoopsOn{card} = {{
    {library:.3f},
    {{
{rows}
    }},
{skinny}
    {{{decode}}},
}};
"""


def header(baseline: dict) -> str:
    text = HEAD.format(nvcc=baseline["nvcc"], tiles=len(TILES), batches=len(BATCHES))
    for card, section in RECORDED.items():
        rows = []
        for tile, family in TILES.items():
            plain, masked = (rate(baseline[section], family, each) for each in (False, True))
            rows.append(f"        {{{plain:.3f}, {masked:.3f}}},  // {tile}")
        steps = [decode_us(baseline[section], batch, CLOCKS[card]) for batch in BATCHES]
        decode = ", ".join(f"{us:.3f}" for us in steps)
        rows, few = "\n".join(rows), skinny(baseline[SKINNY[card]])
        text += CARD.format(card=card, library=library(card), rows=rows, skinny=few, decode=decode)
    return f"{text}\n}}  // namespace lora_ext::plan\n"

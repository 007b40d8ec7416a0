"""What a rule cannot know: another offset, count, id or order that a hand would get wrong."""

from emulated.mutants.faults.fault import Fault

CONSUMER = "gemm/sm90a/multiply.h"
PRODUCER = "gemm/sm90a/load.h"
EPILOGUE = "gemm/sm90a/store.h"
BLOCK = "gemm/sm90a/pipeline.h"
COPY = "tile/copy.h"
STEP_COPY = "gemm/sm80/loads.h"
MAIN_LOOP = "gemm/sm80/kernel.h"
STORE = "gemm/sm80/epilogue.h"

WAIT = "    ptx::cluster_wait();\n"
SET_UP = "    ptx::cluster_arrive_relaxed();\n" + WAIT
LEAVE = "    ptx::cluster_arrive();\n" + WAIT


def thought(name: str, what: str, *edits: tuple[str, str, str], **fields) -> Fault:
    return Fault(name, what, "", edits, **fields)


def off_by(name: str, what: str, file: str, old: str, count: str, step: int = 1) -> list[Fault]:
    """Two faults: `count`, which `old` holds once, less and more a step."""
    return [
        thought(f"{name}:{which}", what, (file, old, old.replace(count, f"{count} {sign} {step}")))
        for which, sign in (("low", "-"), ("high", "+"))
    ]


THOUGHT = [
    thought(
        "consumer.along_row",
        "the left operand advances by 64 bytes of a row",
        (CONSUMER, "Tile::kRowBytes + k16 * kAlongRow,", "Tile::kRowBytes + k16 * 2 * kAlongRow,"),
    ),
    thought(
        "consumer.along_right",
        "the right operand advances twice as far",
        (CONSUMER, "right + k16 * kAlongRight", "right + k16 * 2 * kAlongRight"),
    ),
    thought(
        "consumer.panels",
        "panels lie as far apart as groups of rows",
        (CONSUMER, "kAlongRight, kPanels, kGroup", "kAlongRight, kGroup, kGroup"),
    ),
    thought(
        "producer.half",
        "both blocks load the first half of the right operand",
        (PRODUCER, "static_cast<int>(block.rank) * kHalf", "static_cast<int>(0u) * kHalf"),
        (PRODUCER, "+ block.rank * kHalf", "+ 0u * kHalf"),
    ),
    *(
        thought(
            f"producer.multicast:{which}",
            what,
            (
                PRODUCER,
                "column + panel * 64, k0 + first, kBoth",
                f"column + panel * 64, k0 + first, {mask}",
            ),
            (PRODUCER, "k0, column + first, kBoth", f"k0, column + first, {mask}"),
        )
        for which, what, mask in (
            ("low", "the half is sent to the first block alone", "0b01"),
            ("high", "the half is sent to a third block", "0b111"),
        )
    ),
    thought(
        "producer.dependents_before_t",
        "the next grid may begin before T is there",
        (
            PRODUCER,
            "    ptx::griddepcontrol_wait();\n",
            "    ptx::griddepcontrol_launch_dependents();\n    ptx::griddepcontrol_wait();\n",
        ),
    ),
    thought(
        "epilogue.barrier_id",
        "both consumers meet at one barrier",
        (EPILOGUE, "bar_sync(1u + static_cast<uint32_t>(consumer),", "bar_sync(1u,"),
    ),
    thought(
        "setup.block_barrier_only",
        "a block begins behind a barrier of its own threads",
        (BLOCK, SET_UP, "    __syncthreads();\n"),
    ),
    thought(
        "leave.block_barrier_only",
        "a block leaves behind a barrier of its own threads",
        (BLOCK, LEAVE, "    __syncthreads();\n"),
    ),
    thought(
        "leave.relaxed",
        "a block leaves behind a barrier that does not wait for its peer's arrivals elsewhere",
        (BLOCK, LEAVE, SET_UP),
    ),
    thought(
        "copy.offset",
        "the offset of an element in 32 bits",
        (COPY, "matrix.data + offset;", "matrix.data + (offset << 32 >> 32);"),
    ),
    *off_by(
        "copy.columns",
        "how many columns are left",
        COPY,
        "left = matrix.columns - column;",
        "matrix.columns",
    ),
    *off_by("store.columns", "how many columns are left", STORE, "left = p.n - column;", "p.n"),
    thought(
        "step_copy.offset",
        "the offset of the first chunk in 32 bits",
        (
            STEP_COPY,
            "matrix.data + (static_cast<int64_t>(position) * matrix.pitch + column);",
            "matrix.data + static_cast<int32_t>(position * matrix.pitch + column);",
        ),
    ),
    thought(
        "step_copy.apart",
        "the distance of two chunks in 32 bits",
        (
            STEP_COPY,
            "apart = kApart * matrix.pitch;",
            "apart = static_cast<int32_t>(kApart * matrix.pitch);",
        ),
    ),
    *off_by(
        "step_copy.columns",
        "how many columns are left",
        STEP_COPY,
        "columns = matrix.columns - column;",
        "matrix.columns",
    ),
    thought(
        "step_copy.stays_in_columns",
        "columns are not counted from step to step",
        (STEP_COPY, "source += kColumns, columns -= kColumns;", "source += kColumns;"),
    ),
    thought(
        "step_copy.stays_in_rows",
        "rows are not counted from step to step",
        (STEP_COPY, "source += kCopies * apart, rows -= kRows;", "source += kCopies * apart;"),
    ),
    thought(
        "loop.clear",
        "the accumulators are not cleared for the next tile",
        (MAIN_LOOP, "        clear(acc);\n        multiply_main(", "        multiply_main("),
    ),
    thought(
        "loop.next_stage_unwaited",
        "the next step's first fragments are loaded before its stage is waited for",
        (
            MAIN_LOOP,
            "      finish_step(walk, loads);\n      if (loads.steps == 0) loads.begin_part();\n",
            "      const uint32_t stage = next_stage(walk.stage);\n"
            "      Fragments early;\n      warp.load(early, stage, 0);\n"
            "      finish_step(walk, loads);\n      if (loads.steps == 0) loads.begin_part();\n",
        ),
    ),
    thought(
        "loop.barrier_before_last_fragments",
        "a stage is given up before its last fragments are loaded",
        (
            MAIN_LOOP,
            "      multiply_quarter<false>(acc, now, then, walk.stage, 3, loads);\n"
            "      finish_step(walk, loads);\n",
            "      const uint32_t stage = walk.stage;\n      finish_step(walk, loads);\n"
            "      multiply_quarter<false>(acc, now, then, stage, 3, loads);\n",
        ),
    ),
    thought(
        "loop.copies_before_barrier",
        "a step's copies begin before all have left its stage",
        (
            MAIN_LOOP,
            "        gemm.finish_step(walk, loads);\n        loads.step();\n",
            "        loads.stage = gemm.next_stage(loads.stage);\n        loads.step();\n"
            "        ptx::cp_async_commit_group();\n"
            "        ptx::cp_async_wait_group<Gemm::TileOf::kStages - 1>();\n"
            "        __syncthreads();\n        walk.stage = gemm.next_stage(walk.stage);\n",
        ),
    ),
    thought(
        "loop.stale_fragments",
        "a run of steps begins with the fragments of the tile before",
        (
            MAIN_LOOP,
            "    Fragments now, then;\n    warp.load(now, walk.stage, 0);\n",
            "    Fragments now{}, then;\n",
        ),
    ),
    thought(
        "mask.order_of_shares",
        "the right half of a row has the bits of the left",
        (STORE, "share % kSharesOfRow * 32 + lane % 4 * 2", "lane % 4 * 2"),
    ),
    thought(
        "halves.low",
        "no low half is kept",
        ("tile/halves.h", "rounded<T>(left * kLoScale<T>)", "rounded<T>(0.f)"),
        program="lora_split",
    ),
]

"""What a rule cannot know: another offset, count, id or order that a hand would get wrong."""

from emulator.mutants.faults.fault import Fault

CONSUMER = "lora_gemm_sm90a/multiply.h"
PRODUCER = "lora_gemm_sm90a/load.h"
EPILOGUE = "lora_gemm_sm90a/store.h"
BLOCK = "lora_gemm_sm90a/pipeline.h"
COPY = "tile_copy_sm80.h"
STORE = "lora_gemm_sm80_epilogue.h"

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
        "loop.clear",
        "the accumulators are not cleared for the next tile",
        ("lora_gemm_sm80.h", "      clear(acc);\n", ""),
    ),
    thought(
        "halves.low",
        "no low half is kept",
        ("halves.h", "rounded<T>(left * kLoScale<T>)", "rounded<T>(0.f)"),
    ),
]

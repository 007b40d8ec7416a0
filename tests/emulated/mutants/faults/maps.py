"""Tensor maps that do not fit the arrays or the kernel's boxes."""

from emulated.mutants.faults.fault import Fault

FILE = "gemm/sm90a/launch.h"


def of_maps(name: str, what: str, why: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, ((FILE, old, new),), program="lora_gemm_sm90a")


MAPS = [
    of_maps(
        "right_box_of_a_whole_tile",
        "the boxes of the right operand are those of both blocks",
        "twice the announced bytes come, over the half beside and the stage behind",
        "encode(data, p.n, depth, pitch, kRows)",
        "encode(data, p.n, depth, pitch, 2 * kRows)",
    ),
    of_maps(
        "y_box_of_a_whole_tile",
        "the boxes of Y have 128 rows, a slab has 16",
        "the store reads the slab behind as well, and writes other warps' rows",
        "encode(p.y, p.m, p.n, p.y_pitch, Tile::kStoreBoxRows)",
        "encode(p.y, p.m, p.n, p.y_pitch, Tile::kM)",
    ),
    of_maps(
        "y_columns_of_the_pitch",
        "Y's map is as wide as its pitch",
        "columns between the rows, which belong to others, are overwritten",
        "encode(p.y, p.m, p.n, p.y_pitch, Tile::kStoreBoxRows)",
        "encode(p.y, p.m, static_cast<int>(p.y_pitch), p.y_pitch, Tile::kStoreBoxRows)",
    ),
    of_maps(
        "p_columns_of_the_pitch",
        "P's map is as wide as its pitch",
        "what lies between the rows is multiplied, where zeros were to be filled in",
        "maps.p = left(p.p, p.k, p.p_pitch)",
        "maps.p = left(p.p, static_cast<int>(p.p_pitch), p.p_pitch)",
    ),
    of_maps(
        "left_rows_rounded_up",
        "the left operand's map has as many rows as the row blocks cover",
        "rows past the end of the array are read",
        "encode(data, p.m, depth, pitch, Tile::kLeftBoxRows)",
        "encode(data, (p.m + Tile::kPairM - 1) / Tile::kPairM * Tile::kPairM, depth, pitch, "
        "Tile::kLeftBoxRows)",
    ),
]

"""From the accumulators through a slab of shared memory to Y."""

from emulated.mutants.faults.fault import Fault, faults_of

FILE = "gemm/sm90a/store.h"

FENCE = "    ptx::fence_proxy_async_shared();\n"
SYNC = "    __syncwarp();\n"
FULL = "    if (ptx::elect_sync()) {\n"
STORE = "      ptx::tma_store_2d(&maps.y, slab, column, row);\n"
COMMIT = "      ptx::bulk_commit_group();\n"
WAIT = "    if (ptx::elect_sync()) ptx::bulk_wait_group_read<Tile::kSlabs - 1>();\n"

of_epilogue = faults_of(FILE)


EPILOGUE = [
    of_epilogue(
        "store_fence_by_one_lane",
        "only the first lane executes the proxy fence before the barrier",
        "the other lanes' stmatrix are not fenced on any path to the store",
        (FENCE, "    if (lane == 0) ptx::fence_proxy_async_shared();\n"),
    ),
    of_epilogue(
        "store_fence_of_global",
        "the proxy fence before the store is that of global memory",
        "the slab lies in shared memory",
        (FENCE, "    ptx::fence_proxy_async_global();\n"),
    ),
    of_epilogue(
        "store_fence_before_writes",
        "the proxy fence stands before the slab is written",
        "it covers earlier writes only",
        (FENCE, ""),
        (
            "        fill(slab, &acc",
            "        ptx::fence_proxy_async_shared();\n        fill(slab, &acc",
        ),
    ),
    of_epilogue(
        "store_before_barrier",
        "the slab is stored before the warp's barrier",
        "other lanes may not have written their rows",
        (FENCE + SYNC, FENCE),
        (STORE + COMMIT + "    }\n", STORE + COMMIT + "    }\n" + SYNC),
    ),
    of_epilogue(
        "slab_waited_after_barrier",
        "the storing lane waits for the slab after the barrier that says it is free",
        "the other lanes write the slab while the store before still reads it",
        (WAIT + SYNC, SYNC + WAIT),
    ),
    of_epilogue(
        "slab_changes_per_row_block",
        "all parts of a row block use one slab",
        "the next part is written while the last may still be read",
        ("(i * kParts + part) % Tile::kSlabs", "(i * kParts) % Tile::kSlabs"),
    ),
    of_epilogue(
        "slabs_overlap",
        "the slabs of a warp begin a slab after those of the warp before",
        "the second slab of one warp is the first of the next",
        ("(consumer * 4 + warp) * Tile::kSlabs *", "(consumer * 4 + warp) *"),
    ),
    of_epilogue(
        "slabs_of_a_consumer",
        "all warps of a consumer share two slabs",
        "they write them at the same time",
        ("(consumer * 4 + warp) * Tile::kSlabs *", "(consumer * 4) * Tile::kSlabs *"),
    ),
    of_epilogue(
        "storer_changes_with_slab",
        "every second slab is stored by another lane",
        "bulk groups belong to a lane: those that the elected one waits for are others",
        (FULL, "    if (lane == column / 64 % 2) {\n"),
    ),
    of_epilogue(
        "commit_before_store",
        "the bulk group is committed before the store is issued",
        "the store is in the next group, which the wait leaves in flight",
        (STORE + COMMIT, COMMIT + STORE),
    ),
    of_epilogue(
        "outside_stores_without_a_group",
        "a slab outside the matrix is neither stored nor committed",
        "wait_group counts groups: one too many stays in flight, and it reads the slab written next",
        (FULL, FULL.replace("ptx::elect_sync()", "ptx::elect_sync() && column < p.n")),
    ),
    of_epilogue(
        "store_coordinates_exchanged",
        "row and column are exchanged in the store's coordinates",
        "x is the coordinate along the contiguous dimension",
        (STORE, STORE.replace("column, row", "row, column")),
    ),
    of_epilogue(
        "staging_half_a_pattern_off",
        "the staging slabs start 512 bytes past a multiple of 1024",
        "the store's swizzle goes by the address, the writer's by the row",
        ("+ Tile::kStaging +", "+ Tile::kStaging + 512 +"),
    ),
    of_epilogue(
        "staging_swizzle_by_row_pairs",
        "the slab is written with the swizzle phase row / 2",
        "the 128-byte swizzle changes with every row",
        ("(block + lane / 16) ^ (row % 8)", "(block + lane / 16) ^ (row / 2 % 8)"),
    ),
    of_epilogue(
        "stmatrix_by_inside_lanes",
        "lanes whose row lies outside a short matrix leave out stmatrix",
        "it is .aligned: the whole warp must execute it",
        ("    ptx::stmatrix_x4(", "    if (row < p.m) ptx::stmatrix_x4("),
    ),
    Fault(
        "bias_in_pairs",
        "both columns of a pair are read where the first of them is inside",
        "with an odd number of columns the last read goes past the array",
        (("gemm/sm80/epilogue.h", "at < n ? static_cast", "column + i * 8 < n ? static_cast"),),
    ),
    of_epilogue(
        "bias_by_fragment_row",
        "the column of an accumulator is taken from the lane's row in the fragment",
        "columns go with lane % 4, rows with lane / 4",
        ("(first + i) * 8 + lane % 4 * 2", "(first + i) * 8 + lane / 4 * 2"),
    ),
    Fault(
        "bias_row_of_both_consumers",
        "both consumers keep their bias in one row",
        "they write it at the same time, in pingpong schedules for different tiles",
        (
            (
                FILE,
                " + static_cast<size_t>(consumer) * Tile::kBiasColumns;",
                ";",
            ),
        ),
    ),
    Fault(
        "bias_put_after_the_barriers",
        "the bias is put into shared memory behind the second barrier",
        "other threads read it before",
        (
            (
                FILE,
                "    bias.put(loaded);\n    warpgroup_barrier();\n",
                "    warpgroup_barrier();\n    bias.put(loaded);\n",
            ),
        ),
    ),
]

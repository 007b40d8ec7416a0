"""From the accumulators through a slab of shared memory to Y."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    BIAS,
    GRID_WAIT,
    SLAB_FREE,
    SLAB_FULL,
    SLAB_WAIT,
    STMATRIX,
    STORE,
    STORE_COMMIT,
    STORE_FENCE,
    STORER,
)

EPILOGUE = [
    Fault(
        "store_fence_by_one_thread",
        "only the storing thread executes the proxy fence before the barrier",
        "the other threads' stmatrix are not fenced on any path to the store",
        [(STORE_FENCE, "      if (thread == 0) ptx::fence_proxy_async_shared();\n")],
    ),
    Fault(
        "store_fence_of_global",
        "the proxy fence before the store is that of global memory",
        "the slab lies in shared memory",
        [(STORE_FENCE, "      ptx::fence_proxy_async_global();\n")],
    ),
    Fault(
        "store_fence_before_writes",
        "the proxy fence stands before the slab is written",
        "it covers earlier writes only",
        [(STORE_FENCE, ""), (SLAB_FREE, SLAB_FREE + STORE_FENCE)],
    ),
    Fault(
        "store_before_barrier",
        "the slab is stored before the warpgroup's barrier",
        "other warps may not have written their rows",
        [
            (SLAB_FULL, ""),
            ("      slab ^= 1;\n", SLAB_FULL + "      slab ^= 1;\n"),
        ],
    ),
    Fault(
        "slab_waited_after_barrier",
        "the storing thread waits for the slab after the barrier that says it is free",
        "the other threads write the slab while the store before still reads it",
        [(SLAB_WAIT, ""), (SLAB_FREE, SLAB_FREE + SLAB_WAIT)],
    ),
    Fault(
        "slab_changes_per_tile",
        "both halves of a tile use one slab",
        "the second half is written while the first may still be read",
        [("      slab ^= 1;\n    }\n", "    }\n    slab ^= 1;\n")],
    ),
    Fault(
        "slabs_overlap",
        "the slab index is consumer + slab",
        "the second slab of one warpgroup is the first of the other",
        [
            (
                "(consumer * Plan::kSlabs + slab) * Plan::kSlabBytes",
                "(consumer + slab) * Plan::kSlabBytes",
            )
        ],
    ),
    Fault(
        "storer_changes_with_slab",
        "the second slab is stored by the first thread of the second warp",
        "bulk groups belong to a thread: those that thread 0 waits for are others",
        [(STORER, "      if (thread == static_cast<int>(slab) * 32) {\n")],
    ),
    Fault(
        "commit_before_store",
        "the bulk group is committed before the store is issued",
        "the store is in the next group, which the wait leaves in flight",
        [(STORE, STORE_COMMIT + STORE), (STORE_COMMIT, "")],
    ),
    Fault(
        "outside_stores_without_a_group",
        "a slab outside the matrix is neither stored nor committed",
        "wait_group counts groups: one too many stays in flight, and it reads the slab written next",
        [(STORER, "      if (thread == 0 && row_block * kBlockM + consumer * 64 < p.m) {\n")],
    ),
    Fault(
        "store_coordinates_exchanged",
        "row and column are exchanged in the store's coordinates",
        "x is the coordinate along the contiguous dimension",
        [
            (
                "staging, column0, row_block * kBlockM + consumer * 64);",
                "staging, row_block * kBlockM + consumer * 64, column0);",
            )
        ],
    ),
    Fault(
        "staging_half_a_pattern_off",
        "the staging slabs start 512 bytes past a multiple of 1024",
        "the store's swizzle goes by the address, the writer's by the row",
        [("kStaging = kW + kStages * kWBytes;", "kStaging = kW + kStages * kWBytes + 512;")],
    ),
    Fault(
        "staging_swizzle_by_row_pairs",
        "the slab is written with the swizzle phase row / 2",
        "the 128-byte swizzle changes with every row",
        [("(j * 2 + lane / 16) ^ (row % 8)", "(j * 2 + lane / 16) ^ (row / 2 % 8)")],
    ),
    Fault(
        "stmatrix_by_inside_lanes",
        "lanes whose row lies outside the matrix leave out stmatrix",
        "it is .aligned: the whole warp must execute it",
        [(STMATRIX, "        if (row_block * kBlockM + consumer * 64 + row < p.m)\n  " + STMATRIX)],
    ),
    Fault(
        "bias_in_pairs",
        "the bias is read as float2 where the first of the two columns is inside",
        "with an odd number of columns the last read goes past the array",
        [
            (
                BIAS,
                "          const float2 pair = column < columns\n"
                "                                  ? *reinterpret_cast<const float2*>(p.bias + column)\n"
                "                                  : float2{0.f, 0.f};\n"
                "          const float low = pair.x, high = pair.y;\n",
            )
        ],
    ),
    Fault(
        "bias_by_fragment_row",
        "the column of an accumulator is taken from the lane's row in the fragment",
        "columns go with lane % 4, rows with lane / 4",
        [("j * 16 + i / 2 * 8 + lane % 4 * 2", "j * 16 + i / 2 * 8 + lane / 4 * 2")],
    ),
    Fault(
        "grid_awaited_by_one_warpgroup",
        "only the first consumer warpgroup waits for the grid before",
        "the second reads the bias with nothing in between",
        [(GRID_WAIT, "    if (consumer == 0) ptx::griddepcontrol_wait();\n")],
    ),
    Fault(
        "grid_awaited_before_the_store_only",
        "the grid before is awaited where the tile is stored",
        "the bias has been read by then",
        [(GRID_WAIT, ""), (STORE, "        ptx::griddepcontrol_wait();\n" + STORE)],
    ),
]

"""Operands, fences, commits and waits of the tensor cores."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    LAST_RELEASES,
    LAST_WAIT,
    S_COMMIT,
    S_FENCE,
    S_FRAGMENTS,
    S_WAIT_GROUP,
    TILE_FENCE,
    TILE_RELEASE,
    TILE_WAIT,
)

WGMMA = [
    Fault(
        "full_awaited_by_one_warp",
        "only the first warp of a warpgroup awaits the full barrier",
        "the other three have not observed the completion of the copies that their wgmmas read",
        [
            (
                '    if (!Fault::skip("consumer.wait_full")) {\n',
                "    if (warp == 0) {\n",
            )
        ],
    ),
    Fault(
        "try_wait_once",
        "the full barrier is tried once, without a loop",
        "mbarrier.try_wait returns false when its time limit is over",
        [
            (
                "      ptx::mbarrier_wait(block.full(ring.slot),\n"
                "                         Fault::value(",
                "      ptx::mbarrier_try_wait(block.full(ring.slot),\n"
                "                         Fault::value(",
            )
        ],
    ),
    Fault(
        "release_before_last_wait",
        "the last two stages of a tile are released before the last wgmmas are awaited",
        "wgmma still reads them",
        [(LAST_WAIT, ""), (LAST_RELEASES, LAST_RELEASES + LAST_WAIT)],
    ),
    Fault(
        "release_before_wait_previous",
        "the stage before is released before its wgmmas are awaited",
        "two groups may be in flight, and the older one reads that stage",
        [(TILE_WAIT, TILE_RELEASE + TILE_WAIT), (TILE_RELEASE, "")],
    ),
    Fault(
        "release_current_stage",
        "each step releases its own stage, though one group of wgmmas stays in flight",
        "the group in flight is the one that reads it",
        [
            (TILE_RELEASE, "      release_stage(ring.slot);\n"),
            (LAST_RELEASES, "    release_stage(ring.slot);\n"),
        ],
    ),
    Fault(
        "s_release_before_wait",
        "in a job for S the stage is released once X is in registers",
        "the wgmmas still read A from the same stage",
        [
            (
                S_WAIT_GROUP,
                "      __syncwarp();\n      release_stage(ring.slot);\n      ptx::wgmma_wait_group<0>();\n",
            )
        ],
    ),
    Fault(
        "fragments_after_fence",
        "ldmatrix loads the A fragments after wgmma.fence",
        "the fence must lie between the last access to a register and the wgmma that reads it",
        [(S_FENCE, ""), (S_FRAGMENTS, S_FRAGMENTS + S_FENCE)],
    ),
    Fault(
        "fragments_reloaded_in_flight",
        "the next fragments are loaded into the registers that wgmmas in flight read",
        "registers of A must not change before wgmma.wait_group",
        [
            (S_FRAGMENTS, ""),
            (
                "    float acc[kRank / 2];\n",
                "    float acc[kRank / 2];\n    int previous = -1;\n"
                "    uint32_t fragments[kBlockK / 16][4];\n",
            ),
            (
                S_FENCE,
                "      if (previous >= 0) {\n        ptx::wgmma_wait_group<0>();\n"
                "        __syncwarp();\n        release_stage(previous);\n      }\n"
                "      previous = ring.slot;\n" + S_FENCE,
            ),
            (S_WAIT_GROUP, ""),
            (
                "    publish_s(acc, row_block, amax);\n",
                "    ptx::wgmma_wait_group<0>();\n    __syncwarp();\n    release_stage(previous);\n"
                "    publish_s(acc, row_block, amax);\n",
            ),
        ],
    ),
    Fault(
        "accumulators_cleared_after_fence",
        "the accumulators are set to zero after wgmma.fence, and always accumulated into",
        "the fence must lie between the last write of the accumulators and the first wgmma",
        [
            (
                TILE_FENCE,
                TILE_FENCE + "    if (!accumulate)\n      for (float& value : acc) value = 0.f;\n",
            ),
            ('Fault::flag("consumer.accumulate", accumulate || k16 > 0)', "true"),
        ],
    ),
    Fault(
        "wgmma_skipped_by_outside_warps",
        "a warp whose rows lie outside the matrix leaves out its wgmmas for S",
        "wgmma is a warpgroup's: all four warps must execute the same",
        [
            (
                S_FENCE,
                "      if (row_block * kBlockM + consumer * 64 + warp * 16 < p.m) {\n" + S_FENCE,
            ),
            (S_COMMIT, S_COMMIT + "      }\n"),
        ],
    ),
    Fault(
        "descriptor_per_warp",
        "each warp describes its own 16 rows of X",
        "descriptors must agree in the warpgroup; the hardware adds the warp's rows itself",
        [
            (
                "block.x_tile(slot) + consumer * 64 * Plan::kRowBytes + k16 * 32;",
                "block.x_tile(slot) + (consumer * 64 + warp * 16) * Plan::kRowBytes + k16 * 32;",
            )
        ],
    ),
    Fault(
        "w_leading_and_stride_exchanged",
        "the descriptor of W takes the leading offset for the stride and the other way round",
        "groups of 8 rows are taken from 16 bytes (K-major) or 8192 bytes (MN-major) further",
        [
            (
                "block.w_tile(slot) + k16 * kStep, kLeading, 8 * Plan::kRowBytes,",
                "block.w_tile(slot) + k16 * kStep, 8 * Plan::kRowBytes, kLeading,",
            )
        ],
    ),
    Fault(
        "mn_major_step_of_k_major",
        "an MN-major W advances 32 bytes per k16, as a K-major one does",
        "16 rows of k are 2048 bytes",
        [("kStep = kMN ? 16 * Plan::kRowBytes : 32,", "kStep = 32,")],
    ),
    Fault(
        "x_descriptor_64_byte_swizzle",
        "X's descriptor names the 64-byte swizzle, its tensor map the 128-byte swizzle",
        "chunks are looked for where other ones lie",
        [
            (
                "ptx::matrix_descriptor(x, 16, 8 * Plan::kRowBytes, ptx::Swizzle::k128)",
                "ptx::matrix_descriptor(x, 16, 8 * Plan::kRowBytes, ptx::Swizzle::k64)",
            )
        ],
    ),
    Fault(
        "fragment_swizzle_of_four_rows",
        "the reader of X's fragments takes the swizzle to repeat after 4 rows",
        "the 128-byte swizzle repeats after 8",
        [("(k16 * 2 + lane / 16) ^ (row % 8)", "(k16 * 2 + lane / 16) ^ (row % 4)")],
    ),
    Fault(
        "w_tiles_off_by_a_row",
        "the W tiles start 128 bytes past a multiple of 1024, with a base offset of 0",
        "the swizzle depends on address bits 7-9, and the descriptor says that the pattern starts here",
        [("kW = kX + kStages * kXBytes;", "kW = kX + kStages * kXBytes + 128;")],
    ),
]

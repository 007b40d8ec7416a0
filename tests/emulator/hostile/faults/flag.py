"""The flag by which one cluster tells others that its rows of S are there."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    PUBLISH,
    PUBLISH_BARRIER,
)

FLAG = [
    Fault(
        "publish_before_barrier",
        "the flag of S is counted before the warpgroup's barrier",
        "the other threads' rows of S may not have been written",
        [(PUBLISH_BARRIER, ""), (PUBLISH, PUBLISH + PUBLISH_BARRIER)],
    ),
    Fault(
        "publish_relaxed",
        "the flag of S is counted by a relaxed atomic",
        "S is not ordered before the flag",
        [
            (
                "ptx::atomic_add_release_gpu(p.s_ready + row_block, 1)",
                "ptx::atomic_add_relaxed_gpu(p.s_ready + row_block, 1)",
            )
        ],
    ),
    Fault(
        "publish_with_cluster_fence",
        "the flag of S is counted by a relaxed atomic after fence.acq_rel.cluster",
        "the reader may be in another cluster, outside the fence's scope",
        [
            (
                PUBLISH,
                "    if (thread == 0) {\n      ptx::fence_acq_rel_cluster();\n"
                "      ptx::atomic_add_relaxed_gpu(p.s_ready + row_block, 1);\n    }\n",
            )
        ],
    ),
    Fault(
        "publish_for_the_other_warpgroup",
        "the first consumer warpgroup counts for both",
        "its barrier says nothing of the second one's rows",
        [
            (
                PUBLISH,
                "    if (consumer == 0 && thread == 0) ptx::atomic_add_release_gpu(p.s_ready + row_block, 2);\n",
            )
        ],
    ),
    Fault(
        "publish_by_load_and_store",
        "the flag of S is counted by an acquire load and a release store",
        "both warpgroups may read the same count, and one increment is lost",
        [
            (
                "ptx::atomic_add_release_gpu(p.s_ready + row_block, 1)",
                "ptx::store_release_gpu(p.s_ready + row_block,\n"
                "                               ptx::load_acquire_gpu(p.s_ready + row_block) + 1)",
            )
        ],
    ),
    Fault(
        "publish_inside_only",
        "a warpgroup whose rows lie outside the matrix does not count",
        "the tiles of its row block wait for ever",
        [
            (
                '    if (Fault::flag("consumer.s_publisher", thread == 0)) {\n',
                "    if (thread == 0 && row_block * kBlockM + consumer * 64 < p.m) {\n",
            )
        ],
    ),
    Fault(
        "flag_per_row_pair",
        "both blocks of a cluster count in the flag of their row pair, which is awaited as before",
        "two of the four parts suffice, and they may be the other block's",
        [
            ("p.s_ready + row_block, 1)", "p.s_ready + row_block / kClusterSize, 1)"),
            (
                "ptx::load_acquire_gpu(p.s_ready + row_block)",
                "ptx::load_acquire_gpu(p.s_ready + row_block / kClusterSize)",
            ),
        ],
    ),
    Fault(
        "leave_publishing_when_outside",
        "a warp whose rows lie outside the matrix returns before the barrier of S",
        "the barrier waits for four warps",
        [
            (
                PUBLISH_BARRIER,
                "    if (row_block * kBlockM + consumer * 64 + warp * 16 >= p.m) return;\n"
                + PUBLISH_BARRIER,
            )
        ],
    ),
    Fault(
        "tiles_before_s",
        "jobs for tiles are drawn before those for S",
        "with fewer clusters than tiles all of them wait for an S that nobody has begun",
        [
            (
                'Fault::flag("producer.s_job", ticket < jobs.row_pairs)',
                "ticket >= jobs.row_pairs * jobs.column_blocks",
            ),
            (
                'Fault::flag("consumer.s_job", ticket < jobs.row_pairs)',
                "ticket >= jobs.row_pairs * jobs.column_blocks",
            ),
            (
                "load_tile(ring, row_block, ticket / jobs.row_pairs - 1)",
                "load_tile(ring, row_block, ticket / jobs.row_pairs)",
            ),
            (
                "store_tile(acc, row_block, ticket / jobs.row_pairs - 1, slab)",
                "store_tile(acc, row_block, ticket / jobs.row_pairs, slab)",
            ),
        ],
    ),
    Fault(
        "s_index_in_int",
        "the index into S is computed in int",
        "it overflows from row 2^26 on",
        [
            (
                "pairs[(static_cast<size_t>(row) * kRank + column) / 2]",
                "pairs[(row * kRank + column) / 2]",
            )
        ],
        missed_because="an S of 2^26 rows takes 4 GiB: no case is that large, and the index overflows "
        "in none. A kernel's own tests must place its arrays so that offsets pass 2^31.",
    ),
]

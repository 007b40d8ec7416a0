"""The producer: loads, what they announce, the stages that they fill."""

from emulated.mutants.faults.fault import Fault, faults_of

PRODUCER = "gemm/sm90a/load.h"
CONSUMER = "gemm/sm90a/multiply.h"
BLOCK = "gemm/sm90a/pipeline.h"
JOBS = "gemm/sm90a/jobs.h"
FUSED_SHRINK = "gemm/sm90a/fused_shrink.h"

EMPTY = "    ptx::mbarrier_wait(block.empty(ring.slot), ring.parity ^ 1);\n"
EXPECT = "    ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), kBytes);\n"
LEFT = "    ptx::tma_load_2d(block.left(ring.slot), left, block.full(ring.slot), k0, at.row);\n"
RELEASE = "if (lane < kBlocks) ptx::mbarrier_arrive_remote(block.empty(slot), static_cast<uint32_t>(lane));"
READY = "    jobs.wait_until_ready(at.row);\n"
LOW_RANK = "    producer.load_low_rank_product(ring, at);\n"
POLL = "    while (ptx::load_acquire_gpu(ready) < Tile::kConsumers) {\n    }\n"
GLOBAL_FENCE = "    ptx::fence_proxy_async_global();\n"
FULL_COLUMNS = "column + panel * 64, k0 + first, kBoth"
FULL_ROWS = "k0, column + first, kBoth"

of_producer = faults_of(PRODUCER)


LOADS = [
    of_producer(
        "arrives_before_it_expects",
        "the producer arrives at the full barrier, and again when it announces the bytes",
        "the first arrival completes a phase without a byte",
        (EXPECT, "    ptx::mbarrier_arrive_remote(block.full(ring.slot), block.rank);\n" + EXPECT),
    ),
    of_producer(
        "left_load_before_empty",
        "the load of the left operand is issued before the stage has been acquired",
        "the wgmmas of the round before may still read it",
        (EMPTY + EXPECT + LEFT, LEFT + EMPTY + EXPECT),
    ),
    Fault(
        "t_load_before_ready",
        "the flag of T is awaited after the load of T has been issued",
        "the copy may read T before it has been written",
        ((FUSED_SHRINK, READY + LOW_RANK, LOW_RANK + READY),),
    ),
    Fault(
        "t_proxy_fence_before_acquire",
        "the proxy fence stands before the flag's acquire",
        "the writes of T come before the fence in no order, so the copy may miss them",
        ((JOBS, POLL + GLOBAL_FENCE, GLOBAL_FENCE + POLL),),
    ),
    Fault(
        "t_proxy_fence_of_shared",
        "the proxy fence before the load of T is that of shared memory",
        "T lies in global memory, which fence.proxy.async.shared::cta does not cover",
        ((JOBS, GLOBAL_FENCE, "    ptx::fence_proxy_async_shared();\n"),),
    ),
    Fault(
        "t_flag_polled_relaxed",
        "the flag of T is polled by a relaxed atomic",
        "no acquire: the copy may read T as it was before",
        (
            (
                JOBS,
                "ptx::load_acquire_gpu(ready) <",
                "ptx::atomic_add_relaxed_gpu(const_cast<uint32_t*>(ready), 0) <",
            ),
        ),
    ),
    Fault(
        "t_awaited_by_one_rank",
        "only block 0 of the cluster awaits the T of its row block",
        "block 1 loads another row block's T, which another cluster may still be computing",
        ((FUSED_SHRINK, READY, "    if (jobs.block.rank == 0) jobs.wait_until_ready(at.row);\n"),),
    ),
    Fault(
        "first_t_not_awaited",
        "the T of the first row blocks is taken to be there",
        "another cluster makes it",
        (
            (
                FUSED_SHRINK,
                READY,
                "    if (at.row >= Tile::kPairM) jobs.wait_until_ready(at.row);\n",
            ),
        ),
    ),
    Fault(
        "t_proxy_fence_before_grid",
        "the proxy fence stands before the wait for the grid that writes T",
        "the grid's writes do not come before the fence",
        (
            (
                PRODUCER,
                "    ptx::griddepcontrol_wait();\n" + GLOBAL_FENCE,
                GLOBAL_FENCE + "    ptx::griddepcontrol_wait();\n",
            ),
        ),
    ),
    Fault(
        "fused_dependents_without_fence",
        "the next grid may begin, and nothing passes on what the grids before this one wrote",
        "it polls a counter that one of them has cleared",
        (
            (
                FUSED_SHRINK,
                "Producer::launch_dependents();",
                "ptx::griddepcontrol_launch_dependents();",
            ),
        ),
    ),
    of_producer(
        "half_to_the_wrong_place",
        "each block multicasts its half to where the other's half belongs",
        "the columns of a tile are exchanged",
        ("block.right(ring.slot) + block.rank *", "block.right(ring.slot) + (block.rank ^ 1) *"),
    ),
    of_producer(
        "half_column_without_rank",
        "both blocks load the first half of the columns, each to its place",
        "the right half of every tile repeats the left one",
        ("const int first = static_cast<int>(block.rank) * kHalf;", "const int first = 0;"),
    ),
    of_producer(
        "multicast_to_the_peer_only",
        "the multicast mask holds the peer but not the block itself",
        "a block's own half never comes, its barrier waits for ever",
        *(
            (old, old.replace("kBoth", "static_cast<uint16_t>(1 << (block.rank ^ 1))"))
            for old in (FULL_COLUMNS, FULL_ROWS)
        ),
    ),
    of_producer(
        "expect_own_half_only",
        "the producer announces the bytes that it loads itself, not those that the peer sends",
        "the stage is taken for full while a half of the right operand is under way",
        (EXPECT, EXPECT.replace("kBytes", "(kBytes + Tile::kLeftBytes) / 2")),
    ),
    of_producer(
        "expect_inside_rows_only",
        "the producer announces the bytes of the left operand's rows inside the matrix",
        "a copy completes the bytes of the whole box, those filled with zeros too",
        (
            EXPECT,
            EXPECT.replace(
                "kBytes",
                "kBytes - Tile::kLeftBytes + static_cast<uint32_t>(max(0, min(Tile::kM, block.p.m - at.row)))"
                " * Tile::kRowBytes",
            ),
        ),
    ),
    of_producer(
        "no_load_of_rows_outside",
        "the left operand is not loaded for a tile outside the matrix, but its bytes are announced",
        "the stage never fills",
        (LEFT, "    if (at.row < block.p.m)" + LEFT),
    ),
    Fault(
        "release_to_own_block_only",
        "consumers release a stage to their own producer only, whose barrier counts them alone",
        "the peer multicasts into a stage that is still being read here",
        (
            (
                BLOCK,
                "ptx::mbarrier_init(empty(slot), kReleases);",
                "ptx::mbarrier_init(empty(slot), Tile::kReaders);",
            ),
            (
                CONSUMER,
                RELEASE,
                "if (lane == 0) ptx::mbarrier_arrive_remote(block.empty(slot), block.rank);",
            ),
        ),
    ),
    Fault(
        "empty_count_of_one_block",
        "the empty barriers count one block's consumers, though both blocks' arrive",
        "a phase completes when half of the consumers have left the stage",
        (
            (
                BLOCK,
                "ptx::mbarrier_init(empty(slot), kReleases);",
                "ptx::mbarrier_init(empty(slot), Tile::kReaders);",
            ),
        ),
    ),
    Fault(
        "remote_arrive_shared_cta",
        "the arrival at the peer uses shared::cta on an address from mapa",
        "an address of the peer's memory lies outside the shared::cta window",
        (
            (
                CONSUMER,
                RELEASE,
                "if (lane < kBlocks) ptx::mbarrier_arrive_expect_tx("
                "ptx::map_shared(block.empty(slot), static_cast<uint32_t>(lane)), 0);",
            ),
        ),
    ),
    Fault(
        "rings_restart_with_each_tile",
        "producer and consumers begin each tile at slot 0 and parity 0",
        "the barriers' phases go on: after a number of steps that is no multiple of two laps both "
        "disagree with them",
        (
            (
                PRODUCER,
                "      const Place at = block.place_of(tile);\n",
                "      ring = Ring{};\n      const Place at = block.place_of(tile);\n",
            ),
            (
                CONSUMER,
                "      const Place at = compute(",
                "      ring = Ring{};\n      const Place at = compute(",
            ),
        ),
    ),
]

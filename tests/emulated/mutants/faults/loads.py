"""The producer: loads, what they announce, the stages that they fill."""

from emulated.mutants.faults.fault import Fault, faults_of

PRODUCER = "gemm/sm90a/load.h"
CONSUMER = "gemm/sm90a/multiply.h"
BLOCK = "gemm/sm90a/pipeline.h"

EMPTY = "    ptx::mbarrier_wait(block.empty(ring.slot), ring.parity ^ 1);\n"
EXPECT = "    ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), Tile::kStageBytes);\n"
LEFT = "    ptx::tma_load_2d(block.left(ring.slot), left, block.full(ring.slot), k0, at.row);\n"
RELEASE = "if (lane < kBlocks) ptx::mbarrier_arrive_remote(block.empty(slot), static_cast<uint32_t>(lane));"
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
        (EXPECT, EXPECT.replace("Tile::kStageBytes", "(Tile::kStageBytes + Tile::kLeftBytes) / 2")),
    ),
    of_producer(
        "expect_inside_rows_only",
        "the producer announces the bytes of the left operand's rows inside the matrix",
        "a copy completes the bytes of the whole box, those filled with zeros too",
        (
            EXPECT,
            EXPECT.replace(
                "Tile::kStageBytes",
                "Tile::kStageBytes - Tile::kLeftBytes + static_cast<uint32_t>(max(0, min(Tile::kM, block.p.m - at.row)))"
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

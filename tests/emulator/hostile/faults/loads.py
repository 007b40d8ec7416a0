"""The producer: loads, what they announce, the stages that they fill."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    ACQUIRE_S,
    ACQUIRE_TILE_STAGE,
    EMPTY_COUNT,
    EXPECT,
    RELEASE,
    S_PROXY_FENCE,
    S_WAIT,
    X_LOAD,
)

LOADS = [
    Fault(
        "arrive_then_expect",
        "the producer arrives first and announces the bytes afterwards",
        "between the two the phase has no pending arrival and no pending byte: it completes",
        [
            (
                EXPECT,
                "    ptx::mbarrier_arrive(block.full(ring.slot));\n"
                "    ptx::mbarrier_expect_tx(block.full(ring.slot), bytes);\n",
            )
        ],
    ),
    Fault(
        "x_load_before_empty",
        "the load of X is issued before the stage has been acquired",
        "the wgmmas of the round before may still read the X tile",
        [(ACQUIRE_TILE_STAGE, ""), (X_LOAD, X_LOAD + ACQUIRE_TILE_STAGE)],
    ),
    Fault(
        "s_load_before_flag",
        "the flag of S is awaited after the load of S has been issued",
        "the copy may read S before it has been written",
        [(ACQUIRE_S, ""), (X_LOAD, X_LOAD + ACQUIRE_S)],
    ),
    Fault(
        "s_proxy_fence_before_acquire",
        "the proxy fence stands before the flag's acquire",
        "the writes of S come before the fence in no order, so the copy may miss them",
        [(S_PROXY_FENCE, ""), (S_WAIT, S_PROXY_FENCE + S_WAIT)],
    ),
    Fault(
        "s_proxy_fence_of_shared",
        "the proxy fence before the load of S is that of shared memory",
        "S lies in global memory, which fence.proxy.async.shared::cta does not cover",
        [(S_PROXY_FENCE, "    ptx::fence_proxy_async_shared();\n")],
    ),
    Fault(
        "s_flag_polled_relaxed",
        "the flag of S is polled by a relaxed atomic",
        "no acquire: the copy may read S as it was before",
        [
            (
                "ptx::load_acquire_gpu(p.s_ready + row_block)",
                "ptx::atomic_add_relaxed_gpu(p.s_ready + row_block, 0)",
            )
        ],
    ),
    Fault(
        "s_awaited_by_one_rank",
        "only block 0 of the cluster awaits the S of its row block",
        "block 1 loads another row block's S, which another cluster may still be computing",
        [(ACQUIRE_S, "      if (low_rank && block.rank == 0) acquire_s(row_block);\n")],
    ),
    Fault(
        "s_flag_cached_from_zero",
        "a row block whose flag has been seen is not awaited again; the cache starts at block 0",
        "the first block of S is never awaited",
        [
            (
                "  __device__ __forceinline__ void load_tile(Ring<kStages>& ring, int row_block,\n"
                "                                            int column_block) const {",
                "  __device__ __forceinline__ void load_tile(Ring<kStages>& ring, int row_block,\n"
                "                                            int column_block, int& seen) const {",
            ),
            (
                ACQUIRE_S,
                "      if (low_rank && row_block != seen) acquire_s(row_block), seen = row_block;\n",
            ),
            (
                "        load_tile(ring, row_block, ticket / jobs.row_pairs - 1);",
                "        load_tile(ring, row_block, ticket / jobs.row_pairs - 1, seen);",
            ),
            (
                "  __device__ __forceinline__ void produce() const {\n",
                "  __device__ __forceinline__ void produce() const {\n    int seen = 0;\n",
            ),
        ],
    ),
    Fault(
        "half_to_the_wrong_place",
        "each block multicasts its half of W to where the other's half belongs",
        "the columns of a tile are exchanged",
        [
            (
                "block.w_tile(ring.slot) + block.rank * Plan::kHalfBytes",
                "block.w_tile(ring.slot) + (block.rank ^ 1) * Plan::kHalfBytes",
            )
        ],
    ),
    Fault(
        "half_column_without_rank",
        "both blocks load the first half of W's columns",
        "the right half of every tile repeats the left one",
        [
            (
                "column_block * kBlockN + static_cast<int>(block.rank) * (kBlockN / kClusterSize)",
                "column_block * kBlockN",
            )
        ],
    ),
    Fault(
        "multicast_to_the_peer_only",
        "the multicast mask holds the peer but not the block itself",
        "a block's own half never comes, its barrier waits for ever",
        [
            (
                'Fault::count("producer.multicast", 0b11, 0b01, 0b111)',
                "static_cast<uint16_t>(1 << (block.rank ^ 1))",
            )
        ],
    ),
    Fault(
        "expect_own_half_only",
        "the producer announces the bytes that it loads itself, not those that the peer sends",
        "the stage is taken for full while a half of W is under way",
        [(ACQUIRE_TILE_STAGE, "      acquire_stage(ring, Plan::kXBytes + Plan::kHalfBytes);\n")],
    ),
    Fault(
        "expect_inside_rows_only",
        "the producer announces the bytes of X's rows inside the matrix",
        "a copy completes the bytes of the whole box, those filled with zeros too",
        [
            (
                ACQUIRE_TILE_STAGE,
                "      const int rows = p.m - row_block * kBlockM;\n"
                "      const uint32_t inside = rows < 0 ? 0 : rows < kBlockM ? rows : kBlockM;\n"
                "      acquire_stage(ring, inside * Plan::kRowBytes + Plan::kWBytes);\n",
            )
        ],
    ),
    Fault(
        "no_load_of_rows_outside",
        "X is not loaded for a row block outside the matrix, but its bytes are announced",
        "the stage never fills",
        [(X_LOAD, "      if (row_block * kBlockM < p.m)\n" + X_LOAD)],
    ),
    Fault(
        "release_to_own_block_only",
        "consumers release a stage to their own producer only, whose barrier counts them alone",
        "the peer multicasts into a stage that is still being read here",
        [
            (EMPTY_COUNT, "kWarps"),
            (
                RELEASE,
                "      if (lane == 0) ptx::mbarrier_arrive_cluster(block.empty(slot), block.rank);\n",
            ),
        ],
    ),
    Fault(
        "empty_count_of_one_block",
        "the empty barriers count one block's consumers, though both blocks' arrive",
        "a phase completes when half of the consumers have left the stage",
        [(EMPTY_COUNT, "kWarps")],
    ),
    Fault(
        "remote_arrive_shared_cta",
        "the remote arrival uses mbarrier.arrive.shared::cta on an address from mapa",
        "an address of the peer's memory lies outside the shared::cta window",
        [(RELEASE, "      ptx::mbarrier_arrive(ptx::map_shared(block.empty(slot), lane));\n")],
    ),
    Fault(
        "rings_restart_with_each_job",
        "producer and consumer begin each job at slot 0 and parity 0",
        "the barriers' phases go on: after a number of steps that is no multiple of 8 both "
        "disagree with them",
        [
            (
                "  __device__ __forceinline__ void produce() const {\n    Ring<kStages> ring;\n",
                "  __device__ __forceinline__ void produce() const {\n",
            ),
            (
                "      const int ticket = block.next_ticket(tickets, true);\n",
                "      Ring<kStages> ring;\n      const int ticket = block.next_ticket(tickets, true);\n",
            ),
            (
                "  __device__ __forceinline__ void consume() const {\n    Ring<kStages> ring;\n",
                "  __device__ __forceinline__ void consume() const {\n",
            ),
            (
                "      const int ticket = block.next_ticket(tickets, lane == 0);\n",
                "      Ring<kStages> ring;\n      const int ticket = block.next_ticket(tickets, lane == 0);\n",
            ),
        ],
    ),
]

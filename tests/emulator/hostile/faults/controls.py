"""Legal edits, which must raise no alarm."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    EXPECT,
    GRID_WAIT,
    PUBLISH,
    PUBLISH_BARRIER,
    SETUP_ARRIVE,
    STORE,
    STORE_FENCE,
    TILE_FENCE,
)

CONTROLS = [
    Fault(
        "expect_after_loads",
        "the bytes are announced, with the arrival, after the loads have been issued",
        "the arrival is still pending, so the phase cannot complete before; the byte count may be "
        "below zero in between",
        [
            (EXPECT, ""),
            (
                "      ptx::tma_load_2d(block.w_tile(ring.slot), &maps.a, block.full(ring.slot), "
                "step * kBlockK, 0);\n",
                "      ptx::tma_load_2d(block.w_tile(ring.slot), &maps.a, block.full(ring.slot), "
                "step * kBlockK, 0);\n"
                "      ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), Plan::kXBytes + Plan::kABytes);\n",
            ),
            (
                "        ptx::tma_load_2d_multicast(half, w, block.full(ring.slot), half_column, k0, both);\n"
                "      }\n",
                "        ptx::tma_load_2d_multicast(half, w, block.full(ring.slot), half_column, k0, both);\n"
                "      }\n"
                "      ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), Plan::kXBytes + Plan::kWBytes);\n",
            ),
            (
                "acquire_stage(const Ring<kStages>& ring, uint32_t bytes)",
                "acquire_stage(const Ring<kStages>& ring, uint32_t)",
            ),
        ],
        "clean",
    ),
    Fault(
        "set_up_with_relaxed_arrive",
        "the cluster barrier of the set-up uses arrive.relaxed",
        "fence.mbarrier_init releases the inits: the ISA's own example",
        [(SETUP_ARRIVE, "      ptx::cluster_arrive_relaxed();\n")],
        "clean",
    ),
    Fault(
        "publish_by_fence_and_relaxed_add",
        "the flag of S is counted by a relaxed atomic after fence.acq_rel.gpu",
        "fence and strong write are a release pattern",
        [
            (
                PUBLISH,
                "    if (thread == 0) {\n      ptx::fence_acq_rel_gpu();\n"
                "      ptx::atomic_add_relaxed_gpu(p.s_ready + row_block, 1);\n    }\n",
            )
        ],
        "clean",
    ),
    Fault(
        "publish_by_warp",
        "each warp counts its rows of S, of which 8 are awaited",
        "__syncwarp orders the lanes' writes before the first lane's release",
        [
            (PUBLISH_BARRIER, "    __syncwarp();\n"),
            (
                PUBLISH,
                "    if (lane == 0) ptx::atomic_add_release_gpu(p.s_ready + row_block, 1);\n",
            ),
            (
                'Fault::count("producer.s_parts", kConsumers + 0u,\n'
                "                                                               kConsumers - 1u, kConsumers + 1u)",
                "kConsumers * 4u",
            ),
        ],
        "clean",
    ),
    Fault(
        "idle_producer_warps_exit",
        "the two producer warps without work exit at once",
        "barrier.cluster.wait waits for all threads that have not exited",
        [
            (
                "    const GemmWgmmaProducer<kMajorW, Fault> producer{block};\n",
                "    if (block.warp > 1) return;\n    const GemmWgmmaProducer<kMajorW, Fault> producer{block};\n",
            )
        ],
        "clean",
    ),
    Fault(
        "wgmma_fence_before_first_step_only",
        "wgmma.fence stands before the first step of a tile only",
        "between wgmmas of one shape on the same accumulators the order is guaranteed without it",
        [(TILE_FENCE, "    if (!accumulate) ptx::wgmma_fence();\n")],
        "clean",
    ),
    Fault(
        "grid_awaited_by_one_thread",
        "one thread per warpgroup waits for the grid before, the barrier follows",
        "the wait makes that grid's memory visible to the current grid; the barrier orders the rest",
        [(GRID_WAIT, "    if (thread == 0) ptx::griddepcontrol_wait();\n")],
        "clean",
    ),
    Fault(
        "store_fence_after_barrier",
        "the storing thread executes the proxy fence after the barrier, the writers none",
        "the fence lies on the path from every write to the store",
        [(STORE_FENCE, ""), (STORE, "        ptx::fence_proxy_async_shared();\n" + STORE)],
        "clean",
    ),
    Fault(
        "low_rank_step_of_full_width",
        "the step of S and B multiplies all 64 columns of the boxes",
        "those past the rank are filled with zeros",
        [
            (
                "multiply_stage<kRank / 16>(acc, ring.slot, true)",
                "multiply_stage<kBlockK / 16>(acc, ring.slot, true)",
            )
        ],
        "clean",
    ),
    Fault(
        "registers_24_and_240",
        "the producer keeps 24 registers, the consumers take 240",
        "128 * 24 + 256 * 240 = 64512",
        [
            (
                "kProducerRegisters = 40, kConsumerRegisters = 232;",
                "kProducerRegisters = 24, kConsumerRegisters = 240;",
            )
        ],
        "clean",
    ),
    Fault(
        "drain_of_reads_only",
        "before the end only the reads of the stores are awaited",
        "shared memory is no longer needed, and the writes belong to the grid, whose end awaits them",
        [
            (
                '      if (!Fault::skip("consumer.drain")) ptx::bulk_wait_group<0>();\n',
                "      ptx::bulk_wait_group_read<0>();\n",
            )
        ],
        "clean",
    ),
]

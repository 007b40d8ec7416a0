"""Barriers before the first job; maxima, counts and exits after the last."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    AMAX_STORE,
    FENCE_INIT,
    FINISH_FENCE,
    FINISH_GRID,
    FINISH_WAIT,
    LEAVE_ARRIVE,
    LEAVE_WAIT,
    SETUP_ARRIVE,
    SETUP_THREAD,
)

SET_UP_AND_FINISH = [
    Fault(
        "fence_init_before_inits",
        "the fence for mbarrier.init stands before the inits",
        "it makes visible what came before it only",
        [(FENCE_INIT, ""), (SETUP_THREAD, SETUP_THREAD + "      ptx::fence_mbarrier_init();\n")],
    ),
    Fault(
        "inits_shared_out_one_fence",
        "a second thread initialises the tickets' barriers, the first alone fences; arrive.relaxed",
        "the fence covers its own thread's inits, and nothing else releases the other's",
        [
            (
                "      for (int slot = 0; slot < kTickets; ++slot) {\n"
                '        if (!Fault::skip("setup.init_ticket_full")) {\n',
                "    }\n    if (threadIdx.x == 32) {\n"
                "      for (int slot = 0; slot < kTickets; ++slot) {\n"
                '        if (!Fault::skip("setup.init_ticket_full")) {\n',
            ),
            (FENCE_INIT, "    }\n    if (threadIdx.x == 0) {\n" + FENCE_INIT),
            (SETUP_ARRIVE, "      ptx::cluster_arrive_relaxed();\n"),
        ],
    ),
    Fault(
        "map_copied_to_local_memory",
        "the block's context holds a copy of the tensor maps",
        "a tensor map must lie in parameter, constant or global memory, not in a thread's local memory",
        [("const GemmWgmmaMaps& maps;", "const GemmWgmmaMaps maps;")],
    ),
    Fault(
        "maps_not_grid_constant",
        "the tensor maps are a parameter without __grid_constant__",
        "its address is that of a local copy, which TMA cannot read",
        [("const __grid_constant__ GemmWgmmaMaps maps,", "const GemmWgmmaMaps maps,")],
    ),
    Fault(
        "amax_fence_after_wait",
        "the fence that publishes the warps' maxima stands after the cluster barrier",
        "arrive.relaxed publishes nothing that came before it",
        [(FINISH_FENCE, ""), (FINISH_WAIT, FINISH_WAIT + FINISH_FENCE)],
    ),
    Fault(
        "amax_fence_by_one_thread",
        "only thread 0 fences before arrive.relaxed",
        "the maxima were written by other threads",
        [(FINISH_FENCE, "    if (threadIdx.x == 0) ptx::fence_acq_rel_cluster();\n")],
    ),
    Fault(
        "leave_by_block_barrier",
        "the blocks leave after a barrier of their own threads",
        "block 1's shared memory may be gone while block 0 reads it",
        [(LEAVE_ARRIVE, "    __syncthreads();\n"), (LEAVE_WAIT, "")],
    ),
    Fault(
        "leave_arrive_before_read",
        "all threads arrive at the last cluster barrier before the maxima are read",
        "the barrier no longer keeps the peer until they have been",
        [(FINISH_GRID, LEAVE_ARRIVE + FINISH_GRID), (LEAVE_ARRIVE, "")],
    ),
    Fault(
        "two_arrivals_then_two_waits",
        "threads with nothing to read arrive for the second phase before they wait for the first",
        "a thread must not arrive twice at the cluster's barrier without a wait in between",
        [
            (
                FINISH_WAIT,
                "    const bool reader = rank == 0 && threadIdx.x == 0;\n"
                "    if (!reader) ptx::cluster_arrive();\n" + FINISH_WAIT,
            ),
            (LEAVE_ARRIVE, "    if (reader) ptx::cluster_arrive();\n"),
        ],
    ),
    Fault(
        "grid_release_in_cluster_scope",
        "a cluster's maximum is published by fence.acq_rel.cluster",
        "it is read by another cluster",
        [
            (
                '    if (!Fault::skip("finish.release_fence")) ptx::fence_acq_rel_gpu();\n',
                "    ptx::fence_acq_rel_cluster();\n",
            )
        ],
    ),
    Fault(
        "grid_acquire_in_cluster_scope",
        "the last cluster acquires the others' maxima by fence.acq_rel.cluster",
        "they were written by other clusters",
        [
            (
                '      if (!Fault::skip("finish.acquire_fence")) ptx::fence_acq_rel_gpu();\n',
                "      ptx::fence_acq_rel_cluster();\n",
            )
        ],
    ),
    Fault(
        "count_before_fence",
        "a cluster counts itself as finished, then fences",
        "its maximum is not ordered before the count",
        [
            ('    if (!Fault::skip("finish.release_fence")) ptx::fence_acq_rel_gpu();\n', ""),
            (
                "    const uint32_t before = ptx::atomic_add_relaxed_gpu(p.finished, 1);\n",
                "    const uint32_t before = ptx::atomic_add_relaxed_gpu(p.finished, 1);\n"
                "    ptx::fence_acq_rel_gpu();\n",
            ),
        ],
    ),
    Fault(
        "finished_reset_by_plain_store",
        "the count of finished clusters is reset by an ordinary store",
        "it races with the other clusters' atomics, after which they do not fence",
        [("atomicExch(p.finished, 0u);", "*p.finished = 0;")],
    ),
    Fault(
        "cluster_amax_by_block",
        "a cluster leaves its maximum at the index of its first block",
        "that is past the end of the array from the second cluster on",
        [
            (
                "p.cluster_amax[cluster] = cluster_amax();",
                "p.cluster_amax[blockIdx.x] = cluster_amax();",
            )
        ],
    ),
    Fault(
        "amax_stored_before_reduction",
        "the first lane stores its own maximum before the warp's reduction",
        "31 lanes are left out",
        [
            (AMAX_STORE, ""),
            (
                '    for (int offset = Fault::value("consumer.amax_offset", 16, 8); offset > 0; offset /= 2) {\n',
                AMAX_STORE
                + '    for (int offset = Fault::value("consumer.amax_offset", 16, 8); offset > 0; offset /= 2) {\n',
            ),
        ],
    ),
    Fault(
        "shuffle_by_lanes_with_a_maximum",
        "only lanes that hold a maximum above 0 take part in the shuffle, whose mask names all",
        "every lane of the mask must execute it",
        [
            (
                "      amax = fmaxf(amax, __shfl_down_sync(",
                "      if (amax > 0.f) amax = fmaxf(amax, __shfl_down_sync(",
            )
        ],
    ),
    Fault(
        "shared_memory_without_amax",
        "the launch asks for shared memory up to the maxima",
        "they are written past the block's allocation",
        [("kBytes = kAmax + 4 * kConsumers * 4;", "kBytes = kAmax;")],
    ),
]

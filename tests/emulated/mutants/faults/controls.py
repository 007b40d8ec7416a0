"""Legal edits, which must raise no alarm."""

from emulated.mutants.faults.fault import Fault

PRODUCER = "gemm/sm90a/load.h"
EPILOGUE = "gemm/sm90a/store.h"
BLOCK = "gemm/sm90a/pipeline.h"
ROLES = "gemm/sm90a/kernel.h"

EXPECT = "    ptx::mbarrier_arrive_expect_tx(block.full(ring.slot), Tile::kStageBytes);\n"
HALF = "    multicast_half(ring, right, k0, at.column);\n"
FENCE = "    ptx::fence_proxy_async_shared();\n"
STORE = "      ptx::tma_store_2d(&maps.y, slab, column, row);\n"


def control(name: str, what: str, why: str, *edits: tuple[str, str, str], **fields) -> Fault:
    return Fault(name, what, why, edits, expected="clean", **fields)


CONTROLS = [
    control(
        "expect_after_loads",
        "the bytes are announced, with the arrival, after the loads have been issued",
        "the arrival is still pending, so the phase cannot complete before; the byte count may be "
        "below zero in between",
        (PRODUCER, EXPECT, ""),
        (PRODUCER, HALF, HALF + EXPECT),
    ),
    control(
        "set_up_with_release",
        "a block arrives with release before its first tile",
        "that orders more than it must",
        (BLOCK, "    ptx::cluster_arrive_relaxed();\n", "    ptx::cluster_arrive();\n"),
    ),
    control(
        "idle_producer_warps_exit",
        "the producer's warps without work exit at once",
        "barrier.cluster.wait waits for all threads that have not exited",
        (
            ROLES,
            "    block.sync_before_exit();\n",
            "    if (threadIdx.x >= 32 && threadIdx.x < Tile::kWarpgroup) return;\n    block.sync_before_exit();\n",
        ),
    ),
    control(
        "store_fence_after_barrier",
        "the storing lane executes the proxy fence after the barrier, the writers none",
        "the fence lies on the path from every write to the store",
        (EPILOGUE, FENCE, ""),
        (EPILOGUE, STORE, "      ptx::fence_proxy_async_shared();\n" + STORE),
    ),
    control(
        "registers_24_and_240",
        "the producer keeps 24 registers, the consumers take 240",
        "128 * 24 + 256 * 240 = 64512",
        (ROLES, "setmaxnreg_dec<Tile::kProducerRegisters>", "setmaxnreg_dec<24>"),
        (ROLES, "setmaxnreg_inc<Tile::kConsumerRegisters>", "setmaxnreg_inc<240>"),
    ),
    control(
        "drain_of_reads_only",
        "before the end only the reads of the stores are awaited",
        "shared memory is no longer needed, and the writes belong to the grid, whose end awaits them",
        (EPILOGUE, "ptx::bulk_wait_group<0>();", "ptx::bulk_wait_group_read<0>();"),
    ),
]

"""Operands, fences, commits and waits of the tensor cores, and the registers of the roles."""

from emulated.mutants.faults.fault import Fault, faults_of

CONSUMER = "gemm/sm90a/multiply.h"
PRODUCER = "gemm/sm90a/load.h"
BLOCK = "gemm/sm90a/pipeline.h"
ROLES = "gemm/sm90a/kernel.h"

FULL = "    ptx::mbarrier_wait(block.full(now.ring.slot), now.ring.parity);\n"
EMPTY = "    ptx::mbarrier_wait(block.empty(ring.slot), ring.parity ^ 1);\n"
WAIT_PREVIOUS = (
    "    ptx::wgmma_wait_group<1>();  // this step's group goes on, the one before has ended\n"
)
RELEASE_HELD = "    if (now.held >= 0) release(now.held);\n"
FINISH = "    wait_for_products(acc);\n    release(now.held);\n"
MULTIPLY = "    multiply<kSteps, kRightMNMajor>(acc, now);\n"
DEC = "    ptx::setmaxnreg_dec<Tile::kProducerRegisters>();\n"
INC = "    ptx::setmaxnreg_inc<Tile::kConsumerRegisters>();\n"
WARP = "static_cast<int>(threadIdx.x) / 32 % 4"

of_consumer = faults_of(CONSUMER)
of_roles = faults_of(ROLES)


PRODUCTS = [
    of_consumer(
        "full_awaited_by_one_warp",
        "only the first warp of a warpgroup awaits the full barrier",
        "the other three have not observed the completion of the copies that their wgmmas read",
        (
            FULL,
            f"    if ({WARP} == 0) ptx::mbarrier_wait(block.full(now.ring.slot), now.ring.parity);\n",
        ),
    ),
    Fault(
        "try_wait_once",
        "full and empty barriers are tried once, without a loop",
        "mbarrier.try_wait returns false when its time limit is over",
        (
            (CONSUMER, FULL, FULL.replace("mbarrier_wait", "mbarrier_try_wait")),
            (PRODUCER, EMPTY, EMPTY.replace("mbarrier_wait", "mbarrier_try_wait")),
        ),
    ),
    of_consumer(
        "release_before_last_wait",
        "the last stage of a tile is released before the last wgmmas are awaited",
        "wgmma still reads it",
        (FINISH, "    release(now.held);\n    wait_for_products(acc);\n"),
    ),
    of_consumer(
        "release_before_wait_previous",
        "the stage before is released before its wgmmas are awaited",
        "two groups may be in flight, and the older one reads that stage",
        (WAIT_PREVIOUS + RELEASE_HELD, RELEASE_HELD + WAIT_PREVIOUS),
    ),
    of_consumer(
        "release_current_stage",
        "each step releases its own stage, though one group of wgmmas stays in flight",
        "the group in flight is the one that reads it",
        (RELEASE_HELD, "    release(now.ring.slot);\n"),
        (FINISH, "    wait_for_products(acc);\n"),
    ),
    of_consumer(
        "accumulators_cleared_after_fence",
        "the accumulators are set to zero after wgmma.fence, and always accumulated into",
        "the fence must lie between the last write of the accumulators and the first wgmma",
        (
            "    ptx::wgmma_fence();\n",
            "    ptx::wgmma_fence();\n"
            "    if (!now.accumulate)\n      for (auto& row : acc)\n        for (float& value : row) value = 0.f;\n",
        ),
        ("now.accumulate || k16 > 0", "true"),
    ),
    of_consumer(
        "wgmma_fence_before_first_step_only",
        "wgmma.fence stands before the first step of a tile only",
        "in between the mask and the scale touch the accumulators",
        ("    ptx::wgmma_fence();\n", "    if (!now.accumulate) ptx::wgmma_fence();\n"),
    ),
    of_consumer(
        "wgmma_skipped_by_outside_warps",
        "a warp whose rows lie outside a short matrix leaves out its wgmmas",
        "wgmma is a warpgroup's: all four warps must execute the same",
        (
            MULTIPLY,
            f"    if ({WARP} * 16 < block.p.m) multiply<kSteps, kRightMNMajor>(acc, now);\n",
        ),
    ),
    of_consumer(
        "descriptor_per_warp",
        "each warp describes its own 16 rows of the left operand",
        "descriptors must agree in the warpgroup; the hardware adds the warp's rows itself",
        ("left + i * 64 * Tile::kRowBytes +", f"left + (i * 64 + {WARP} * 16) * Tile::kRowBytes +"),
    ),
    of_consumer(
        "leading_and_stride_exchanged",
        "the right descriptor takes the leading offset for the stride and the other way round",
        "groups of 8 rows are taken from 16 bytes (K-major) or a panel (MN-major) further",
        ("kPanels, kGroup, ptx::Swizzle::k128", "kGroup, kPanels, ptx::Swizzle::k128"),
    ),
    of_consumer(
        "mn_major_step_of_k_major",
        "an MN-major right operand advances 32 bytes per k16, as a K-major one does",
        "16 rows of k are 2048 bytes",
        ("right + k16 * kAlongRight", "right + k16 * kAlongRow"),
    ),
    of_consumer(
        "left_descriptor_64_byte_swizzle",
        "the left descriptor names the 64-byte swizzle, its tensor map the 128-byte swizzle",
        "chunks are looked for where other ones lie",
        ("16, kGroup, ptx::Swizzle::k128", "16, kGroup, ptx::Swizzle::k64"),
    ),
    Fault(
        "right_tiles_off_by_a_row",
        "the right tiles start 128 bytes past a multiple of 1024, with a base offset of 0",
        "the swizzle depends on address bits 7-9, and the descriptor says that the pattern starts here",
        (
            (
                BLOCK,
                "return left(slot) + Tile::kLeftBytes;",
                "return left(slot) + Tile::kLeftBytes + 128;",
            ),
        ),
    ),
    of_roles(
        "dec_in_one_warp",
        "only the two producer warps with work give up registers",
        "setmaxnreg is a warpgroup's, and two warps return too few for the consumers",
        (DEC, "    if (threadIdx.x < 64) ptx::setmaxnreg_dec<Tile::kProducerRegisters>();\n"),
    ),
    of_roles(
        "dec_after_the_work",
        "the producer gives up its registers after it has produced",
        "the consumers wait for registers before they consume anything",
        (DEC + "    produce(warp);\n", "    produce(warp);\n" + DEC),
    ),
    of_roles(
        "dec_in_consumers",
        "the consumers use setmaxnreg.dec to get more registers",
        "dec must name no more than the warp has",
        (INC, INC.replace("_inc", "_dec")),
    ),
    of_roles(
        "inc_to_fewer_than_at_launch",
        "the consumers' budget is 160, fewer than the 168 of the launch",
        "inc must name no fewer than the warp has",
        (INC, "    ptx::setmaxnreg_inc<160>();\n"),
    ),
]

"""Barriers before the first tile and after the last."""

from emulated.mutants.faults.fault import Fault

BLOCK = "gemm/sm90a/pipeline.h"
INITS = "    for (int slot = 0; slot < Tile::kStages; ++slot) {\n"
FENCE = "    ptx::fence_mbarrier_init();\n"
LEAVE = "    ptx::cluster_arrive();\n"

SET_UP = [
    Fault(
        "fence_init_before_inits",
        "the fence for mbarrier.init stands before the inits",
        "it makes visible what came before it only",
        ((BLOCK, FENCE, ""), (BLOCK, INITS, FENCE + INITS)),
    ),
    Fault(
        "two_arrivals_then_two_waits",
        "threads arrive for a second phase before they wait for the first",
        "a thread must not arrive twice at the cluster's barrier without a wait in between",
        ((BLOCK, LEAVE, LEAVE + "    ptx::cluster_arrive();\n"),),
    ),
]

"""One fault: edits of the clustered GEMM's source."""

from dataclasses import dataclass

SOURCES = (
    "gemm_wgmma.h",
    "gemm_wgmma_plan.h",
    "gemm_wgmma_block.h",
    "gemm_wgmma_producer.h",
    "gemm_wgmma_consumer.h",
    "gemm_wgmma.cpp",
)


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    wrong_because: str  # for a control: why it is right
    edits: list[tuple[str, str]]  # old text, which occurs once in all of SOURCES, and new text
    expected: str = "caught"  # or "clean"
    missed_because: str = ""  # the mechanism by which the layer cannot see it

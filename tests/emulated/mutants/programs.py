"""Which programs there are, and which sources' mutants each of them must catch."""

from dataclasses import dataclass
from pathlib import Path

from emulated.mutants.faults import FAULTS
from emulated.mutants.faults.fault import Fault

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
COPIES = ROOT / "build" / "emulator" / "instrumented"

# The programs of kernels/ and the sources whose mutants each of them must catch, by their paths in
# csrc/kernel/.
PROGRAMS = {
    "lora_gemm_sm80": (
        "lora_gemm_sm80",
        "lora_gemm_sm80_loads",
        "lora_gemm_sm80_fragments",
        "lora_gemm_sm80_epilogue",
        "step_copy_sm80",
        "mask_shares",
        "mask",
        "bias",
    ),
    "lora_gemm_sm90a": (
        "lora_gemm_sm90a/kernel",
        "lora_gemm_sm90a/pipeline",
        "lora_gemm_sm90a/load",
        "lora_gemm_sm90a/multiply",
        "lora_gemm_sm90a/mask_ahead",
        "lora_gemm_sm90a/store",
        "lora_gemm_sm90a/tile_bias",
    ),
    "lora_gemm_in_grid_sm90a": ("lora_gemm_sm90a/in_grid", "lora_gemm_sm90a/jobs"),
    "lora_shrink_sm80": (
        "lora_shrink_sm80",
        "lora_reduce",
        "fragment_mask",
        "sum_of_splits",
        "tile_copy_sm80",
    ),
    "lora_wgrad_sm80": (
        "lora_wgrad_sm80",
        "lora_reduce_wgrad",
        "fragment_mask",
        "sum_of_splits",
        "tile_copy_sm80",
    ),
    "lora_dsdb_sm80": ("lora_dsdb_sm80", "tile_copy_sm80"),
    "lora_split": ("lora_split", "halves"),
    "lora_decode": (
        "lora_decode_sm80",
        "lora_decode_finish",
        "lora_decode_low_rank",
        "lora_decode_table",
        "lora_decode_work",
    ),
    "dequantize": ("dequantize_4bit", "dequantize_8bit", "dequantized_tile"),
    "lora_grouped_segments": (
        "lora_grouped_segments",
        "lora_grouped_ranks",
        "lora_grouped_entries",
    ),
    "lora_grouped_shrink": (
        "lora_grouped_shrink",
        "lora_grouped_reduce",
        "lora_grouped_operands",
    ),
    "lora_grouped_gemm": ("lora_grouped_gemm", "lora_grouped_rows"),
    "lora_grouped_sequence": ("lora_grouped_params", "lora_grouped_sequence"),
    "lora_grouped_wgrad": ("lora_grouped_wgrad", "lora_grouped_reduce_wgrad"),
}


@dataclass(frozen=True)
class Mutant:
    program: str
    name: str
    what: str = ""
    arguments: tuple[str, ...] = ()
    caught: bool = True  # or it must raise no alarm


def mutants_of_faults(program: str) -> list[Mutant]:
    return [
        Mutant(program, fault.name, fault.what, fault.arguments, fault.expected == "caught")
        for fault in FAULTS
        if program in programs_of(fault)
    ]


def programs_of(fault: Fault) -> list[str]:
    if fault.program:
        return [fault.program]
    stems = {file.removesuffix(".h") for file, _, _ in fault.edits}
    return [program for program, files in PROGRAMS.items() if stems & set(files)]


def copy_of(path: Path) -> Path:
    """The instrumented copy of a source of csrc/, or the source itself if there is none."""
    path = path.resolve()
    if not path.is_relative_to(CSRC):
        return path
    copy = COPIES / path.relative_to(CSRC)
    return copy if copy.exists() else path

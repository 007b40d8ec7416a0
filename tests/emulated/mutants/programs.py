"""Which programs there are, and which sources' mutants each of them must catch."""

from dataclasses import dataclass
from pathlib import Path

from emulated.mutants.faults import FAULTS
from emulated.mutants.faults.fault import Fault

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
COPIES = ROOT / "build" / "emulator" / "instrumented"

# The programs of kernels/ and the sources whose mutants each of them must catch, by their paths in
# csrc/kernels/; of a file with kernels of several programs, "path.function".
PROGRAMS = {
    "lora_gemm_sm80": (
        "gemm/sm80/kernel",
        "gemm/sm80/loads",
        "gemm/sm80/fragments",
        "gemm/sm80/epilogue",
        "tile/mask.aligned_to_draws",
        "tile/mask.draw_for_element",
        "tile/mask.draw",
    ),
    "lora_gemm_sm90a": (
        "gemm/sm90a/kernel",
        "gemm/sm90a/pipeline",
        "gemm/sm90a/load",
        "gemm/sm90a/multiply",
        "gemm/sm90a/mask_ahead",
        "gemm/sm90a/store",
    ),
    "lora_shrink_sm80": (
        "skinny/shrink",
        "skinny/elementwise.lora_reduce",
        "tile/mask.keep_or_drop",
        "tile/halves.sum_of_splits",
        "tile/copy",
    ),
    "lora_wgrad_sm80": (
        "skinny/wgrad",
        "skinny/elementwise.lora_reduce_wgrad",
        "tile/mask.keep_or_drop",
        "tile/halves.sum_of_splits",
        "tile/copy",
    ),
    "lora_dsdb_sm80": ("skinny/dsdb", "tile/copy"),
    "lora_split": ("skinny/elementwise.lora_split", "tile/halves.high_half"),
    "lora_decode": (
        "decode/kernel",
        "decode/finish",
        "decode/low_rank",
        "decode/table",
        "decode/work",
    ),
    "dequantize": ("dequantize/formats",),
    "lora_experts": (
        *(f"experts/{name}" for name in ("chunk", "factors", "launch", "routes", "slots")),
        "tile/expert_rows",
    ),
    "lora_grouped_segments": ("grouped/segments", "grouped/operands.rank_of"),
    "lora_grouped_shrink": (
        "grouped/shrink",
        *(
            f"grouped/operands.{name}"
            for name in ("copy", "entry_of", "place_of", "in_chunks", "row_in_piece")
        ),
    ),
    "lora_grouped_gemm": ("grouped/gemm", "grouped/operands.operator()", "tile/factor_chunk"),
    "lora_grouped_own_weights": ("grouped/own_weights",),
    "lora_grouped_own_weights_sm90a": ("grouped/own_weights_sm90a",),
    "lora_grouped_sequence": ("sequence/grouped_params", "sequence/grouped_sequence"),
    "lora_grouped_wgrad": ("grouped/wgrad",),
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


def is_of(program: str, mutant: str) -> bool:
    """Whether a program must catch a mutant of the rules."""
    return mutant.startswith(tuple(f"{what}." for what in PROGRAMS.get(program, ())))


def copy_of(path: Path) -> Path:
    """The instrumented copy of a source of csrc/, or the source itself if there is none."""
    path = path.resolve()
    if not path.is_relative_to(CSRC):
        return path
    copy = COPIES / path.relative_to(CSRC)
    return copy if copy.exists() else path

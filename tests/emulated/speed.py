"""Prints MFLOP/s of kernels in each flavour: PYTHONPATH=tests python -m emulated.speed."""

from emulated import programs
from emulator import build, run

CASES = {"lora_gemm_sm80": "wide", "lora_gemm_sm90a": "deep"}


def mflops(flavour: str, program: str, size: str) -> float:
    """Of the fastest of three runs, the kernels alone."""
    arguments = ["--size", size, "--seeds", "1:4", "--schedule", "RunAhead", "--resident", "0"]
    runs = run.run_program(flavour, program, *arguments)
    return max(each.case["flops"] / each.case["seconds"] for each in runs) / 1e6


def main() -> None:
    print("| program | size | " + " | ".join(build.FLAVOURS) + " |")
    print("|---|---|" + "---|" * len(build.FLAVOURS))
    for program, size in CASES.items():
        programs.build_programs([(flavour, program) for flavour in build.FLAVOURS])
        cells = [f"{mflops(flavour, program, size):.0f}" for flavour in build.FLAVOURS]
        print(f"| {program} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

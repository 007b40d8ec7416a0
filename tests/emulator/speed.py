"""Prints MFLOP/s of the specimens in each flavour: `python -m emulator.speed` in tests/."""

from emulator import build, run

CASES = {"gemm_mma_sync": "even", "gemm_wgmma": "deep", "lora_gemm_sm80": "wide"}


def mflops(flavour: str, specimen: str, size: str) -> float:
    """Of the fastest of three runs, the kernels alone."""
    arguments = ["--size", size, "--seeds", "1:4", "--schedule", "RunAhead", "--resident", "0"]
    runs = run.run_specimen(flavour, specimen, *arguments)
    return max(each.case["flops"] / each.case["seconds"] for each in runs) / 1e6


def main() -> None:
    print("| specimen | size | " + " | ".join(build.FLAVOURS) + " |")
    print("|---|---|" + "---|" * len(build.FLAVOURS))
    for specimen, size in CASES.items():
        build.build_programs([(flavour, build.source_of(specimen)) for flavour in build.FLAVOURS])
        cells = [f"{mflops(flavour, specimen, size):.0f}" for flavour in build.FLAVOURS]
        print(f"| {specimen} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

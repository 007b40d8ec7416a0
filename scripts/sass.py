"""What ptxas and the disassembler say of every CUDA kernel: `make sass`.

Compiles the kernels of csrc/cuda/ for one architecture and writes build/sass/ARCH.json: registers,
shared memory, blocks on an SM, and counts of the instructions that a kernel stands or falls with.
Prints the same as tables, then what is wrong; the exit status is 1 if anything is. sass_loops.py
finds the loops, sass_main_loops.py replays those that multiply, sass_baseline.py says which of them
are slower than recorded, sass_steps.py the way round a loop of lora_decode, sass_paths.py what a
tile takes of a kernel without loops, sass_kernels.py what is wrong with a kernel.

    python scripts/sass.py [sm_80 | sm_90a ...]        default: sm_80
    python scripts/sass.py --record                    both, and records their main loops, also for
                                                       the planner (sass_rates.py)

nvdisasm comes with CUDA's toolkit or from PyPI (nvidia-cuda-nvdisasm).
"""

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import census
import sass_baseline
import sass_rates
from sass_kernels import OPCODES_SM90A, Kernel, kernels_of
from sass_residence import SHARED, SHARED_OF_CONSUMER_CARDS, Launch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from emulator import cuda_headers  # noqa: E402

BUILD = ROOT / "build" / "sass"
# Columns of the table of main loops: instructions of a step, and cycles that a resource needs.
COUNTED = (
    "tensor",
    "shared",
    "copies",
    "integer",
    "address",
    "uniform",
    "float",
    "branch",
    "barrier",
)
NEEDS = ("tensor", "issue", "shared", "L2", "integer")
SOURCES = (
    *(
        f"lora_{kernels}_{half}"
        for kernels in ("linear", "grouped", "decode")
        for half in ("bf16", "fp16")
    ),
    "dequantize",
)
SOURCES_SM90A = tuple(
    f"{kernel}_sm90a_{half}"
    for kernel in ("lora_gemm", "lora_gemm_in_grid")
    for half in ("bf16", "fp16")
)
SOURCES_OF = {"sm_80": SOURCES, "sm_90a": SOURCES + SOURCES_SM90A}

# Launch of the instances, as csrc/kernel/ has it.
CONSTANTS = """
#include <cstdio>
#include "kernel/lora_decode.h"
#include "kernel/lora_dsdb.h"
#include "kernel/lora_gemm.h"
#include "kernel/lora_gemm_sm90a/jobs.h"
#include "kernel/lora_shrink.h"
#include "kernel/lora_wgrad.h"
using namespace lora_ext::kernel;
template <class Tile>
void print(const char* name, unsigned shared) {
  int resident = 0;
  if constexpr (requires { Tile::kResident; }) resident = Tile::kResident;
  std::printf("%s %u %d 0 %d\\n", name, shared, Tile::kThreads, resident);
}
template <class Tile>
void print_sm90a(const char* name) {
  const auto line = [&](const char* kernel, unsigned shared) {
    std::printf("%s_sm90a_%s %u %d %d 0\\n", kernel, name, shared, Tile::kThreads, Tile::kStages);
  };
  line("lora_gemm", Tile::kSharedBytes);
  line("lora_gemm_in_grid", JobTile<Tile>::kSharedBytes);
}
int main() {
  print<LoraGemmTile128x128>("lora_gemm_128x128", LoraGemmTile128x128::kSharedBytes);
  print<LoraGemmTile128x128Deep>("lora_gemm_128x128x3", LoraGemmTile128x128Deep::kSharedBytes);
  print<LoraGemmTile128x64>("lora_gemm_128x64", LoraGemmTile128x64::kSharedBytes);
  print_sm90a<LoraGemmSm90aTile128x256>("128x256");
  print_sm90a<LoraGemmSm90aTile128x192Pingpong>("128x192");
  print<LoraShrinkTile>("lora_shrink", LoraShrinkTile::kSlabs);
  print<LoraWgradTile>("lora_wgrad", LoraWgradTile::kSharedBytes);
  print<LoraDsdbTile<16>>("lora_dsdb_16", LoraDsdbTile<16>::kSharedBytes);
  print<LoraDsdbTile<32>>("lora_dsdb_32", LoraDsdbTile<32>::kSharedBytes);
  print<LoraDecodeTile<8>>("lora_decode_8", LoraDecodeTile<8>::kSharedBytes);
  print<LoraDecodeTile<16>>("lora_decode_16", LoraDecodeTile<16>::kSharedBytes);
  print<LoraDecodeTile<32>>("lora_decode_32", LoraDecodeTile<32>::kSharedBytes);
  print<LoraDecodeTile<64>>("lora_decode_64", LoraDecodeTile<64>::kSharedBytes);
}
"""


def constants() -> dict[str, Launch]:
    """By name of a tile."""
    source, program = BUILD / "constants.cu", BUILD / "constants"
    source.write_text(CONSTANTS)
    command = [nvcc(), "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return {name: Launch(*map(int, figures)) for name, *figures in rows}


def tool(path: str | None, name: str, package: str) -> str:
    if path is None:
        sys.exit(f"sass: no {name}: install a CUDA toolkit that has it{package}")
    return path


def nvcc() -> str:
    return tool(cuda_headers.nvcc(), "nvcc", "")


def nvdisasm() -> str:
    return tool(cuda_headers.nvdisasm(), "nvdisasm", ", or nvidia-cuda-nvdisasm from PyPI")


def compile_source(source: str, arch: str) -> tuple[str, Path]:
    """ptxas' report and the cubin."""
    cubin = BUILD / f"{source}.{arch}.cubin"
    command = [nvcc(), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
    command += ["-Xptxas", "-v", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"nvcc failed on {source}:\n{done.stderr}")
    return done.stderr, cubin


def examine(arch: str) -> tuple[list[Kernel], list[str]]:
    """All kernels of an architecture, and what is wrong."""
    BUILD.mkdir(parents=True, exist_ok=True)
    known, disassembler = constants(), nvdisasm()
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda source: compile_source(source, arch), SOURCES_OF[arch]))
    kernels, wrong = [], []
    for report, cubin in compiled:
        command = [disassembler, "-c", "-hex", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"nvdisasm failed on {cubin}:\n{done.stderr}")
        kernels += kernels_of(report, done.stdout, arch, known)
        # C7504 to C7519: notes to ptxas, but a kernel three times slower.
        wrong += [line.strip() for line in report.splitlines() if re.search(r"C75\d\d", line)]
    wrong += [line for kernel in kernels for line in kernel.objections()]
    at_no_plan = census.untaken({kernel.name for kernel in kernels})
    wrong += [f"{name} on {arch}: no plan takes it (scripts/census.py)" for name in at_no_plan]
    (BUILD / f"{arch}.json").write_text(
        json.dumps([row(kernel) for kernel in kernels], indent=1) + "\n"
    )
    return kernels, wrong


def row(kernel: Kernel) -> dict:
    blocks = {
        "blocks_per_sm": kernel.blocks(*SHARED[kernel.arch]),
        "blocks_per_sm_86": kernel.blocks(*SHARED_OF_CONSUMER_CARDS),
    }
    return {**asdict(kernel), **blocks}


def table(kernels: list[Kernel], opcodes: tuple[str, ...]) -> str:
    columns = ["kernel", "threads", "shared KiB", "registers", "blocks an SM", "on 8.6, 8.9"]
    columns += ["divisions"]
    lines = [[*columns, *opcodes], ["---"] * (len(columns) + len(opcodes))]
    for kernel in sorted(kernels, key=lambda each: each.name):
        found = row(kernel)
        cells = [kernel.name, kernel.threads, f"{kernel.shared_bytes / 1024:.0f}", kernel.registers]
        cells += [found["blocks_per_sm"], found["blocks_per_sm_86"], kernel.divisions]
        lines.append([*cells, *(kernel.opcodes[name] for name in opcodes)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table_of_tiles(kernels: list[Kernel]) -> str:
    lines = ["| kernel | registers | instructions a value | 16-byte stores of a lane |"]
    lines += ["|---|---|---|---|"]
    for kernel in sorted(kernels, key=lambda each: each.name):
        cells = kernel.name, kernel.registers, f"{kernel.instructions_a_value:.1f}"
        lines.append("| " + " | ".join(map(str, (*cells, kernel.wide_stores))) + " |")
    return "\n".join(lines)


def table_of_loops(kernels: list[Kernel]) -> str:
    """In bfloat16, and those of other dtypes that differ from it."""
    columns = ["kernel", "loop", "warps an SMSP", *COUNTED, *NEEDS]
    columns += ["cycles", "of the tensor rate", "bound by", "products ahead", "copies among"]
    lines, seen = [columns, ["---"] * len(columns)], set()
    for kernel in sorted(kernels, key=lambda each: each.name):
        for loop in kernel.main_loops:
            cells = [loop.warps, *(loop.instructions.get(name, 0) for name in COUNTED)]
            cells += [f"{loop.needs[name]:.0f}" for name in NEEDS]
            cells += [f"{loop.cycles:.0f}", f"{loop.efficiency:.3f}", loop.bound]
            cells += [loop.products_ahead, loop.copies_among]
            alike = sass_baseline.family_of(kernel.name), *cells
            if alike not in seen:
                lines.append([kernel.name, loop.place, *cells])
            seen.add(alike)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def compiler() -> str:
    """nvcc's version, "13.0.88"."""
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\bV([\d.]+)", said)
    return found[1] if found else "unknown"


def compared(arch: str, kernels: list[Kernel]) -> list[str]:
    """Main loops that are slower than recorded; none, with a line printed, for another nvcc."""
    before, now = sass_baseline.read(), compiler()
    if before["nvcc"] != now:
        print(f"main loops were recorded with nvcc {before['nvcc']}, this is {now}: not compared")
        return []
    wrong = sass_baseline.compared(kernels, before[arch])
    if arch == "sm_80":
        section = before[sass_baseline.ON_CONSUMER_CARDS]
        wrong += sass_baseline.compared(kernels, section, consumer=True)
    return wrong


def options(arguments: list[str]) -> argparse.Namespace:
    """The architectures that the command line names, and whether to record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Not by `choices`: before Python 3.12, no argument at all is none of them.
    parser.add_argument("arch", nargs="*", help="default: sm_80")
    parser.add_argument("--record", action="store_true", help="the main loops of both")
    found = parser.parse_args(arguments)
    for arch in found.arch:
        if arch not in SOURCES_OF:
            parser.error(f"expected one of {', '.join(SOURCES_OF)}, but got {arch}")
    found.arch = list(SOURCES_OF) if found.record else found.arch or ["sm_80"]
    return found


def main() -> int:
    failed, asked, recorded = False, options(sys.argv[1:]), {}
    for arch in asked.arch:
        examined, problems = examine(arch)
        recorded[arch] = examined
        if not asked.record:
            problems += compared(arch, examined) + sass_baseline.stale()
        print(f"{arch}: {len(examined)} kernels\n")
        on_wgmma = [kernel for kernel in examined if kernel.is_sm90a]
        others = [kernel for kernel in examined if not kernel.is_sm90a]
        print(table(others, ("HMMA", "LDSM", "LDGSTS", "BAR")), "\n")
        if on_wgmma:
            print(table(on_wgmma, OPCODES_SM90A), "\n")
        streaming = [kernel for kernel in examined if kernel.values]
        print(table_of_tiles(streaming), "\n")
        steps = {kernel.name: kernel.step for kernel in examined if kernel.is_decode}
        print("a step of 2 KiB of W a warp takes, in instructions:", steps, "\n")
        print(table_of_loops(examined), "\n")
        dividing = [kernel.divisions for kernel in examined if kernel.divisions]
        print(f"{sum(dividing)} divisions in main loops, of {len(dividing)} kernels")
        print(
            "\n".join(problems)
            or "no spill, no local memory, no serialised product, no memory barrier in a main loop"
        )
        failed |= bool(problems)
    if asked.record:
        sass_baseline.record(compiler(), recorded)
        sass_rates.HEADER.write_text(sass_rates.header(sass_baseline.read()))
    return failed


if __name__ == "__main__":
    sys.exit(main())

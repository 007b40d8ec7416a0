"""What ptxas and the disassembler say of every CUDA kernel: `make sass`.

Takes the kernels of one architecture from the objects that the package was built of and writes
build/sass/ARCH.json: registers, shared memory, blocks on an SM, and counts of the instructions that
a kernel stands or falls with.
Prints the same as tables, then what is wrong; the exit status is 1 if anything is. sass_loops.py
finds the loops, sass_paths.py a warp's way through kernels without loops and round the loop of
lora_decode, sass_kernels.py what is wrong with a kernel, census.py which no plan takes.

    python scripts/sass.py [sm_80 | sm_90a ...]        default: sm_80

nvdisasm and cuobjdump come with CUDA's toolkit or from PyPI (nvidia-cuda-nvdisasm and
nvidia-cuda-cuobjdump).
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import census
import torch
from sass_kernels import (
    COUNTED,
    OPCODES_SM90A,
    SHARED,
    SHARED_OF_CONSUMER_CARDS,
    Kernel,
    Launch,
    kernels_of,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from emulator import cuda_headers  # noqa: E402

BUILD = ROOT / "build" / "sass"
SOURCES = (
    *(
        f"lora_{kernels}_{half}"
        for kernels in ("linear", "grouped", "decode")
        for half in ("bf16", "fp16")
    ),
    "dequantize",
    "experts",
)
SOURCES_SM90A = tuple(f"lora_gemm_sm90a_{half}" for half in ("bf16", "fp16"))
SOURCES_OF = {"sm_80": SOURCES, "sm_90a": SOURCES + SOURCES_SM90A}

# Launch of the instances, as csrc/kernels/ has it.
CONSTANTS = """
#include <cstdio>
#include "kernels/decode/work.h"
#include "kernels/experts/factors.h"
#include "kernels/skinny/dsdb.h"
#include "kernels/gemm/params.h"
#include "kernels/gemm/sm90a/pipeline.h"
#include "kernels/skinny/shrink.h"
#include "kernels/skinny/wgrad.h"
using namespace lora_ext::kernel;
template <class Tile>
void print(const char* name, unsigned shared) {
  int resident = 0;
  if constexpr (requires { Tile::kResident; }) resident = Tile::kResident;
  std::printf("%s %u %d %d\\n", name, shared, Tile::kThreads, resident);
}
int main() {
  print<LoraGemmTile128x128>("lora_gemm_128x128", LoraGemmTile128x128::kSharedBytes);
  print<LoraGemmTile128x128Deep>("lora_gemm_128x128x3", LoraGemmTile128x128Deep::kSharedBytes);
  print<LoraGemmTile128x64>("lora_gemm_128x64", LoraGemmTile128x64::kSharedBytes);
  print<LoraGemmSm90aTile128x256>("lora_gemm_sm90a_128x256",
                                  LoraGemmSm90aTile128x256::kSharedBytes);
  print<LoraGemmSm90aTile128x192Pingpong>("lora_gemm_sm90a_128x192",
                                          LoraGemmSm90aTile128x192Pingpong::kSharedBytes);
  print<LoraShrinkTile>("lora_shrink", LoraShrinkTile::kSlabs);
  print<LoraWgradTile>("lora_wgrad", LoraWgradTile::kSharedBytes);
  print<LoraDsdbTile<16>>("lora_dsdb_16", LoraDsdbTile<16>::kSharedBytes);
  print<LoraDsdbTile<32>>("lora_dsdb_32", LoraDsdbTile<32>::kSharedBytes);
  print<ExpertsFactors<__half>>("lora_experts_factors", ExpertsFactors<__half>::kSharedBytes);
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


def disassembler(name: str) -> str:
    return tool(cuda_headers.disassembler(name), name, f", or nvidia-cuda-{name} from PyPI")


def built(source: str) -> Path:
    """The object that setup.py compiled last of a source."""
    found = ROOT.glob(f"build/temp-*-{torch.__version__}/csrc/kernels/launch/{source}.cu.o")
    return max(found, key=lambda path: path.stat().st_mtime, default=Path("no object"))


def is_built() -> bool:
    return all(built(source).exists() for source in SOURCES_OF["sm_90a"])


def extract(source: str, arch: str) -> tuple[str, Path]:
    """ptxas' report and the cubin."""
    item = built(source)
    if not item.exists():
        sys.exit(f"sass: {source} was not compiled: `make sass` builds the package with CUDA")
    folder = BUILD / source
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    command = [disassembler("cuobjdump"), "--extract-elf", f".{arch}.cubin", str(item)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    cubins = list(folder.glob("*.cubin"))
    if len(cubins) != 1:
        sys.exit(f"sass: expected one cubin for {arch} in {item}, but found {len(cubins)}")
    return report_for(arch, item.with_suffix(".ptxas").read_text()), cubins[0]


def report_for(arch: str, said: str) -> str:
    """What ptxas said of an architecture's entry functions, each from its line `Compiling entry
    function '...' for 'sm_80'` on, and messages C75xx, which precede it and name none."""
    begins = r"(?=^ptxas info\s*: (?:Compiling entry function|\(C75))"
    parts = re.split(begins, said, flags=re.MULTILINE)
    return "".join(part for part in parts if f" for '{arch}'" in part or ": (C75" in part)


def serialised(report: str) -> list[str]:
    """C7504 to C7519: notes to ptxas, but a kernel three times slower."""
    return [line.strip() for line in report.splitlines() if re.search(r"\(C75\d\d\)", line)]


def examine(arch: str) -> tuple[list[Kernel], list[str]]:
    """All kernels of an architecture, and what is wrong."""
    BUILD.mkdir(parents=True, exist_ok=True)
    known, nvdisasm = constants(), disassembler("nvdisasm")
    kernels, wrong = [], []
    for source in SOURCES_OF[arch]:
        report, cubin = extract(source, arch)
        done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"nvdisasm failed on {cubin}:\n{done.stderr}")
        kernels += kernels_of(report, done.stdout, arch, known)
        wrong += serialised(report)
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


def markdown(lines: list) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(kernels: list[Kernel], opcodes: tuple[str, ...]) -> str:
    columns = ["kernel", "threads", "shared KiB", "registers", "blocks an SM", "on 8.6, 8.9"]
    columns += ["divisions"]
    lines = [[*columns, *opcodes], ["---"] * (len(columns) + len(opcodes))]
    for kernel in sorted(kernels, key=lambda each: each.name):
        found = row(kernel)
        cells = [kernel.name, kernel.threads, f"{kernel.shared_bytes / 1024:.0f}", kernel.registers]
        cells += [found["blocks_per_sm"], found["blocks_per_sm_86"], kernel.divisions]
        lines.append([*cells, *(kernel.opcodes[name] for name in opcodes)])
    return markdown(lines)


def table_of_tiles(kernels: list[Kernel]) -> str:
    columns = ["kernel", "registers", "instructions a value", "16-byte stores of a lane"]
    lines = [columns, ["---"] * len(columns)]
    for kernel in sorted(kernels, key=lambda each: each.name):
        cells = kernel.name, kernel.registers, f"{kernel.instructions_a_value:.1f}"
        lines.append([*cells, kernel.wide_stores])
    return markdown(lines)


def table_of_loops(kernels: list[Kernel]) -> str:
    """Instructions of main loops, rare ways among them; in bfloat16, and where others differ."""
    columns = ["kernel", "loop", "instructions", *COUNTED]
    lines, seen = [columns, ["---"] * len(columns)], set()
    for kernel in sorted(kernels, key=lambda each: each.name):
        for loop in kernel.loops:
            cells = [loop.instructions, *loop.counted.values()]
            alike = re.sub(r" (bf16|fp16)\b", "", kernel.name), *cells
            if loop.main and alike not in seen:
                lines.append([kernel.name, loop.place, *cells])
                seen.add(alike)
    return markdown(lines)


def architectures(arguments: list[str]) -> list[str]:
    """Those that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Not by `choices`: before Python 3.12, no argument at all is none of them.
    parser.add_argument("arch", nargs="*", help="default: sm_80")
    found = parser.parse_args(arguments).arch
    for arch in found:
        if arch not in SOURCES_OF:
            parser.error(f"expected one of {', '.join(SOURCES_OF)}, but got {arch}")
    return found or ["sm_80"]


def main() -> int:
    failed = False
    for arch in architectures(sys.argv[1:]):
        examined, problems = examine(arch)
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
        waiting = [
            f"{each.name} ({each.waited_loads} in {each.round_trips})"
            for each in examined
            if each.waited_loads
        ]
        print(
            "plain loads between a barrier and the next product, and round trips in which they"
            f" come: {', '.join(waiting) or 'none'}"
        )
        print(
            "\n".join(problems)
            or "no spill, no local memory, no serialised product, no memory barrier in a main loop"
        )
        failed |= bool(problems)
    return failed


if __name__ == "__main__":
    sys.exit(main())

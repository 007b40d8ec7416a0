"""What ptxas and the disassembler say of every CUDA kernel: `make sass`.

Compiles csrc/cuda/lora_*.cu for one architecture and writes build/sass/ARCH.json: registers, shared
memory, blocks on an SM, and counts of the instructions that a kernel stands or falls with. Prints
the same as tables, then what is wrong; the exit status is 1 if anything is.

    python scripts/sass.py [sm_80 | sm_90a ...]        default: sm_80

nvdisasm comes with CUDA's toolkit or from PyPI (nvidia-cuda-nvdisasm).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sass"
SOURCES = ("lora_linear_bf16", "lora_linear_fp16")
SOURCES_SM90A = tuple(
    f"{kernel}_sm90a_{half}"
    for kernel in ("lora_gemm", "lora_gemm_in_grid")
    for half in ("bf16", "fp16")
)
SOURCES_OF = {"sm_80": SOURCES, "sm_90a": SOURCES + SOURCES_SM90A}
OPCODES = ("HMMA", "LDGSTS", "LDSM", "LDL", "STL", "BAR")
OPCODES_SM90A = ("HGMMA", "UTMALDG", "MULTICAST", "UTMASTG", "STSM", "USETMAXREG", "ACQBULK")

# Shared memory of an SM and of a block at most, in bytes, for compiled code's smallest card.
SHARED = {"sm_80": (167936, 166912), "sm_90a": (233472, 232448)}
SHARED_OF_CONSUMER_CARDS = (102400, 101376)  # compute capability 8.6 and 8.9, which run sm_80 code
REGISTERS_PER_SM, THREADS_PER_SM = 65536, 2048
RESERVED_PER_BLOCK = 1024  # of shared memory, from compute capability 8.0 on

# Dynamic shared memory and threads of the instances, as csrc/kernel/ has them.
CONSTANTS = """
#include <cstdio>
#include "kernel/lora_dsdb.h"
#include "kernel/lora_gemm.h"
#include "kernel/lora_gemm_sm90a_jobs.h"
#include "kernel/lora_shrink.h"
#include "kernel/lora_wgrad.h"
using namespace lora_ext::kernel;
template <class Tile>
void print(const char* name, unsigned shared) {
  std::printf("%s %u %d\\n", name, shared, Tile::kThreads);
}
template <class Tile>
void print_sm90a(const char* name) {
  std::printf("lora_gemm_sm90a_%s %u %d\\n", name, Tile::kSharedBytes, Tile::kThreads);
  const unsigned with_jobs = JobTile<Tile>::kSharedBytes;
  std::printf("lora_gemm_in_grid_sm90a_%s %u %d\\n", name, with_jobs, Tile::kThreads);
}
int main() {
  print<LoraGemmTile128x256>("lora_gemm_128x256", LoraGemmTile128x256::kSharedBytes);
  print<LoraGemmTile128x128>("lora_gemm_128x128", LoraGemmTile128x128::kSharedBytes);
  print<LoraGemmTile128x64>("lora_gemm_128x64", LoraGemmTile128x64::kSharedBytes);
  print_sm90a<LoraGemmSm90aTile128x256>("128x256");
  print_sm90a<LoraGemmSm90aTile128x128>("128x128");
  print_sm90a<LoraGemmSm90aTile128x192Pingpong>("128x192");
  print<LoraShrinkTile>("lora_shrink", LoraShrinkTile::kSlabs);
  print<LoraWgradTile>("lora_wgrad", LoraWgradTile::kSharedBytes);
  print<LoraDsdbTile<16>>("lora_dsdb_16", LoraDsdbTile<16>::kSharedBytes);
  print<LoraDsdbTile<32>>("lora_dsdb_32", LoraDsdbTile<32>::kSharedBytes);
}
"""


@dataclass
class Kernel:
    """One instance on one architecture."""

    name: str
    arch: str
    threads: int
    shared_bytes: int
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)  # wgmmas of each step that waits once

    def blocks(self, shared_per_sm: int, shared_per_block: int) -> int:
        """Blocks that an SM holds at a time; 0 if one does not fit."""
        if self.shared_bytes > shared_per_block:
            return 0
        warps = self.threads // 32
        registers = -(-self.registers * 32 // 256) * 256 * warps
        by_shared = shared_per_sm // (self.shared_bytes + RESERVED_PER_BLOCK)
        return min(REGISTERS_PER_SM // registers, by_shared, THREADS_PER_SM // self.threads)

    @property
    def is_sm90a(self) -> bool:
        return "sm90a" in self.name

    @property
    def in_grid(self) -> bool:
        return "in_grid" in self.name

    def objections_to_groups(self) -> list[str]:
        """A step's wgmmas follow each other: ptxas put no wait between them."""
        blocks = 2 if "pingpong" in self.name else 1  # of 64 rows
        tail = int(self.name.rsplit(" ", 1)[1])
        whole = {4 * blocks, tail * blocks}
        if set(self.groups) == whole and sum(self.groups) == self.opcodes["HGMMA"]:
            return []
        return [f"groups of {self.groups} HGMMA, expected {sorted(whole)}"]

    def objections(self) -> list[str]:
        """What is wrong, one line each."""
        found = []
        if self.stack_bytes or self.spill_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills")
        if self.opcodes["LDL"] or self.opcodes["STL"]:
            found.append(f"{self.opcodes['LDL']} LDL and {self.opcodes['STL']} STL")
        if self.is_sm90a:
            # What makes T itself waits for no other grid.
            wanted = [name for name in OPCODES_SM90A if name != "ACQBULK" or not self.in_grid]
            found += [f"no {name}" for name in wanted if not self.opcodes[name]]
            found += self.objections_to_groups()
        elif "lora_reduce" not in self.name and "lora_split" not in self.name:
            wanted = ["HMMA", "LDSM"] + ([] if "element" in self.name else ["LDGSTS"])
            found += [f"no {name}" for name in wanted if not self.opcodes[name]]
        if self.blocks(*SHARED[self.arch]) == 0:
            found.append("no block fits on an SM")
        return [f"{self.name} on {self.arch}: {line}" for line in found]


def name_of(demangled: str) -> str:
    """A kernel and its template arguments in short."""
    call = demangled.removeprefix("void ").replace("lora_ext::kernel::", "").split(">(")[0]
    kernel, _, rest = call.partition("<")
    if kernel.endswith("sm90a"):
        return name_of_sm90a(kernel, rest)
    tile = re.search(r"LoraGemmTile<(\d+), (\d+)", rest)
    rest = re.sub(r"LoraGemmTile<[^>]*>, ", "", rest)
    words = [kernel.removesuffix("_sm80")]
    words += [f"{tile[1]}x{tile[2]}"] if tile else []
    words += ["fp16" if rest.startswith("__half") else "bf16"]
    flags = re.findall(r"\b(true|false)\b", rest)
    meanings = {"lora_gemm": ["MN-major", "masked"], "lora_shrink": ["MN-major", "masked"]}
    meanings["lora_wgrad"] = ["masked"]
    for flag, meaning in zip(flags, meanings.get(words[0], []), strict=False):
        words += [meaning] if flag == "true" else []
    words += [number[1] for number in [re.search(r", (16|32), ", rest)] if number]
    words += ["element"] if "Alignment)1" in rest else []
    return " ".join(words)


def name_of_sm90a(kernel: str, arguments: str) -> str:
    """Of "__half, LoraGemmSm90aTile<256, 4, (Sm90aSchedule)0>, true, false, 1, NoFault"."""
    pattern = r"(\w+), LoraGemmSm90aTile<(\d+), \d+, \(?\w+\)?(\d)>, (\w+), (\w+), (\d)"
    half, columns, schedule, mn_major, masked, tail = re.match(pattern, arguments).groups()
    words = [kernel, f"128x{columns}"]
    words += ["pingpong"] if schedule == "1" else []
    words += ["fp16" if half == "__half" else "bf16"]
    words += ["MN-major"] if mn_major == "true" else []
    words += ["masked"] if masked == "true" else []
    return " ".join([*words, "tail", tail])


def constants() -> dict[str, tuple[int, int]]:
    """Shared memory and threads, by name of a tile."""
    source, program = BUILD / "constants.cu", BUILD / "constants"
    source.write_text(CONSTANTS)
    command = ["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return {name: (int(shared), int(threads)) for name, shared, threads in rows}


def launch_of(name: str, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    kernel, *words = name.split()
    tiles = [f"{kernel}_{word}" for word in words if f"{kernel}_{word}" in known]
    return known[tiles[0]] if tiles else known.get(kernel, (0, 256))


def nvdisasm() -> str:
    beside = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin", "nvdisasm")
    found = shutil.which("nvdisasm") or (str(beside) if beside.exists() else None)
    if found is None:
        sys.exit("sass: no nvdisasm: install a CUDA toolkit that has it, or nvidia-cuda-nvdisasm")
    return found


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines()


def compile_source(source: str, arch: str) -> tuple[str, Path]:
    """ptxas' report and the cubin."""
    cubin = BUILD / f"{source}.{arch}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
    command += ["-Xptxas", "-v", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"nvcc failed on {source}:\n{done.stderr}")
    return done.stderr, cubin


INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([.\w]*)", re.MULTILINE
)


def wgmma_groups(instructions: list[tuple[str, str]]) -> list[int]:
    """How many HGMMA there are from each WARPGROUP.ARRIVE to the wait that follows."""
    steps = "".join(
        {"HGMMA": "h", "WARPGROUP": "a" if suffix.startswith(".ARRIVE") else "w"}.get(name, "")
        for name, suffix in instructions
    )
    return [len(group) for group in re.findall(r"a(h+)w", steps)]


def kernels_of(report: str, disassembly: str, arch: str, known: dict) -> list[Kernel]:
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    bodies = dict(
        re.findall(
            r"^\.text\.(\w+):\n(.*?)(?=^\.section|^\t\.section|\Z)",
            disassembly,
            re.DOTALL | re.MULTILINE,
        )
    )
    names = map(name_of, demangled([entry[0] for entry in entries]))
    kernels = []
    for (mangled, stack, stores, loads, registers), name in zip(entries, names, strict=True):
        shared, threads = launch_of(name, known)
        instructions = INSTRUCTION.findall(bodies[mangled])
        used = [opcode for opcode, _ in instructions]
        wanted = [*OPCODES, *(OPCODES_SM90A if "sm90a" in name else ())]
        counts = {opcode: used.count(opcode) for opcode in wanted}
        if "MULTICAST" in counts:
            counts["MULTICAST"] = sum("MULTICAST" in suffix for _, suffix in instructions)
        kernels.append(
            Kernel(
                name,
                arch,
                threads,
                shared,
                int(registers),
                int(stack),
                int(stores) + int(loads),
                counts,
                wgmma_groups(instructions),
            )
        )
    return kernels


def examine(arch: str) -> tuple[list[Kernel], list[str]]:
    """All kernels of an architecture, and what is wrong."""
    BUILD.mkdir(parents=True, exist_ok=True)
    known, disassembler = constants(), nvdisasm()
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda source: compile_source(source, arch), SOURCES_OF[arch]))
    kernels, wrong = [], []
    for report, cubin in compiled:
        done = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"nvdisasm failed on {cubin}:\n{done.stderr}")
        kernels += kernels_of(report, done.stdout, arch, known)
        # C7504 to C7519: notes to ptxas, but a kernel three times slower.
        wrong += [line.strip() for line in report.splitlines() if re.search(r"C75\d\d", line)]
    wrong += [line for kernel in kernels for line in kernel.objections()]
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
    lines = [[*columns, *opcodes], ["---"] * (len(columns) + len(opcodes))]
    for kernel in sorted(kernels, key=lambda each: each.name):
        found = row(kernel)
        cells = [kernel.name, kernel.threads, f"{kernel.shared_bytes / 1024:.0f}", kernel.registers]
        cells += [found["blocks_per_sm"], found["blocks_per_sm_86"]]
        lines.append([*cells, *(kernel.opcodes[name] for name in opcodes)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="*", choices=sorted(SOURCES_OF), help="default: sm_80")
    failed = False
    for wanted in parser.parse_args().arch or ["sm_80"]:
        examined, problems = examine(wanted)
        print(f"{wanted}: {len(examined)} kernels\n")
        on_wgmma = [kernel for kernel in examined if kernel.is_sm90a]
        others = [kernel for kernel in examined if not kernel.is_sm90a]
        print(table(others, ("HMMA", "LDSM", "LDGSTS", "BAR")), "\n")
        if on_wgmma:
            print(table(on_wgmma, OPCODES_SM90A), "\n")
        print("\n".join(problems) or "no spill, no local memory, no serialised product")
        failed |= bool(problems)
    sys.exit(failed)

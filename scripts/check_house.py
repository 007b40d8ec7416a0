"""Checks seven rules of this repository that no linter knows, and prints each breach.

1. Inline assembly stays under csrc/ptx/, one function per instruction.
2. Kernels and their launchers include nothing of torch: they compile in seconds, for every torch.
3. No file names a folder of somebody's machine.
4. A source of csrc/ includes its own folder and folders below it, by their path from csrc/; of cpu/
   and kernels/ neither includes the other.
5. Modules of lora_ext and of benchmarks import one another without a circle, imports inside
   functions included; and so do their folders.
6. emulator/, the execution layer, knows nothing of what runs in it: of csrc/ it has ptx/ alone.
7. A room of lora_ext, which is a folder or a module outside them, imports rooms of lower lines of
   `FLOORS`. The floors, the longest chain of imports between rooms, are printed.

In 5 and 7 imports inside functions and for type checkers count, and a name that is no module is
taken from the package's `__init__`.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}

ASM = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile\b|__volatile__\b)?\s*\(")
TORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](?:torch|ATen|c10|caffe2)/')
TORCH_FREE = re.compile(r"csrc/(?:(?:kernels|ptx)/.*|cpu/isa_[^/]*\.cpp)")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')
# From the top down, the way that a call takes.
FOLDERS = [
    "op/bindings",
    "op",
    "op/route",
    "op/check",
    "op/launch",
    "op/library",
    "cpu",
    "kernels/launch",
    "kernels/sequence",
    "kernels/decode",
    "kernels/experts",
    "kernels/grouped",
    "kernels/skinny",
    "kernels/gemm",
    "kernels/dequantize",
    "kernels",  # what the op calls: operands, and the functions of kernels/launch
    "kernels/tile",
    "kernels/plan",
    "ptx",
    "common",
]
APART = {"cpu", "kernels"}
# The rooms of lora_ext, from the top down.
FLOORS = [
    ["__init__", "__main__"],
    ["reports", "autotune", "pool"],
    ["adapters", "loralib"],
    ["models", "peft", "pretrained"],
    ["nn", "functional"],
    ["call"],
    ["experts", "flops"],
    ["quantized", "packing", "kernels"],
    ["packed_weight"],
    ["measure", "dropout", "invariance", "reference", "model_layers", "rows"],
    ["torch_state", "device", "dtypes", "versions", "build_info", "strict_json"],
]
# Where kernels run without a GPU: the one thing from outside that a source of csrc/ may name.
EXECUTION_LAYER = ("csrc/ptx/target.h", "emulator/emulator.h")
OF_PROJECT = re.compile(r"\s*(?:from|import) (?:emulated|tests|lora_ext|benchmarks|scripts)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|work|Users|opt|mnt|srv|scratch|data)/\w")


def tracked_files() -> list[str]:
    """Every file that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def breaches(name: str, text: str) -> list[tuple[int, str]]:
    """The (line number, what is wrong) pairs of one file."""
    is_cxx = Path(name).suffix in CXX_SUFFIXES
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if is_cxx and not name.startswith("csrc/ptx/") and ASM.search(line):
            found.append((number, "inline assembly belongs in csrc/ptx/"))
        if TORCH_FREE.fullmatch(name) and TORCH_INCLUDE.match(line):
            found.append((number, "this file must compile without torch's headers"))
        if MACHINE_PATH.search(line):
            found.append((number, "names a folder of one machine"))
        if name.startswith("emulator/") and reaches_out(line):
            found.append((number, "emulator/ must not know what runs in it"))
        include = INCLUDE.match(line) if is_cxx and name.startswith("csrc/") else None
        if include and (why := wrong_include(name, include[1])):
            found.append((number, why))
    return found


def reaches_out(line: str) -> bool:
    include = INCLUDE.match(line)
    folder = include[1].rpartition("/")[0].split("/")[0] if include else ""
    return folder not in ("", "emulator", "ptx") or OF_PROJECT.match(line) is not None


def folder_of(path: str) -> str:
    """The innermost folder that a path from csrc/ is in, or ""."""
    folders = [str(folder) for folder in Path(path).parents]
    return next((folder for folder in folders if folder in FOLDERS), "")


def wrong_include(name: str, included: str) -> str:
    """Why a source of csrc/ must not include a file; "" if it may."""
    if (name, included) == EXECUTION_LAYER:
        return ""
    own, folder = folder_of(name.removeprefix("csrc/")), folder_of(included)
    if not own or not folder:
        return f'"{included}" in {name}: expected a file in one of the folders {", ".join(FOLDERS)}'
    if FOLDERS.index(folder) < FOLDERS.index(own):
        return f"{own}/ must not include {folder}/, which stands above it"
    if {own.split("/")[0], folder.split("/")[0]} == APART:
        return f"{own}/ must not include {folder}/, which stands beside it"
    return ""


def imports(modules: dict[str, str]) -> dict[str, set[str]]:
    """The modules out of `modules` (name -> source) that each one imports, wherever it does, for
    type checkers alone, too.

    A package stands for its `__init__`; for its own modules, which name their neighbours by it,
    only where they take a name that is no module.
    """
    found: dict[str, set[str]] = {}
    for name, source in modules.items():
        own = name.rpartition(".")[0]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = own.split(".")
                package = parts[: len(parts) - node.level + 1] if node.level else []
                target = ".".join([*package, *filter(None, [node.module])])
                named = [target, *(f"{target}.{alias.name}" for alias in node.names)]
                if any(not modules.keys() & {each, f"{each}.__init__"} for each in named[1:]):
                    named.append(f"{target}.__init__")
            else:
                continue
            named += [
                f"{other}.__init__" for other in named if not f"{own}.".startswith(f"{other}.")
            ]
            found.setdefault(name, set()).update(modules.keys() & set(named) - {name})
    return found


def circle(modules: dict[str, str]) -> list[str]:
    """The modules along one circle of imports, the first of them again at the end; without one,
    the folders along one; or []."""
    by_module = imports(modules)
    by_folder: dict[str, set[str]] = {}
    for name, others in by_module.items():
        folder = _folder(name)
        by_folder.setdefault(folder, set()).update({*map(_folder, others)} - {folder})
    for graph in (by_module, by_folder):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return list(reversed(error.args[1]))
    return []


def _folder(module: str) -> str:
    """The folder of a package's that a module is in; a module outside them is one itself."""
    return ".".join(module.split(".")[:2])


def floors(modules: dict[str, str]) -> tuple[int, list[str]]:
    """(the floors of lora_ext, what is wrong with its imports), as rule 7 says."""
    line = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    height, wrong = dict.fromkeys(line, 1), []
    if new := {*map(_room, modules)} - {*line}:
        return 0, [f"expected each room in FLOORS, but {', '.join(sorted(new))} is not"]
    graph = imports(modules)
    for name in sorted(graph, key=lambda name: -line[_room(name)]):
        own = _room(name)
        for other in sorted(each for each in graph[name] if _room(each) != own):
            if line[_room(other)] > line[own]:
                height[own] = max(height[own], height[_room(other)] + 1)
            else:
                wrong.append(f"{name} must not import {other}, which does not stand below it")
    return max(height.values()), wrong


def _room(module: str) -> str:
    return module.split(".")[1]


def main() -> int:
    count = 0
    for package in ("lora_ext", "benchmarks"):
        sources = sorted((ROOT / package).rglob("*.py"))
        names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources)
        modules = {name: path.read_text() for name, path in zip(names, sources, strict=True)}
        if package == "lora_ext":
            height, wrong = floors(modules)
            print("\n".join([f"lora_ext: {height} floors", *wrong]))
            count += len(wrong)
        around = circle(modules)
        if around:
            print(f"{package}: modules import one another in a circle: {' -> '.join(around)}")
            count += 1
    for name in tracked_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # an image or another binary file
            continue
        for number, what in breaches(name, text):
            print(f"{name}:{number}: {what}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())

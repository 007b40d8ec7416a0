"""Builds build/emulator/ptx/: programs whose kernels are the PTX that nvcc makes of the project.

nvcc compiles each unit once, with setup.py's flags: the object holds the planner's sequences and
launches, PTX of each default architecture lies beside it. Both are kept by content, so that what is
kept runs without nvcc.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from emulated import mutants, programs
from emulator import build, cuda_headers, kept

ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry ([^( \n]+)\(", re.M)
FOLDER = build.BUILD / "ptx"
UNITS = FOLDER / "units"
KEPT = kept.FOLDER.parent / "ptx"
MOST_KEPT = 60  # units, the youngest: four times those of the project, some MB each
ARCHS = ("80", "90a")
HERE = "tests/emulated/ptx"
# The two sequences launch by csrc/kernels/launch/; the others launch a kernel each.
PROGRAMS = (*mutants.PROGRAMS, programs.WHOLE_OP, "dropout")
NO_NVCC = (
    "expected nvcc, which compiles the kernels to PTX, or PTX of these sources that is kept, but "
    "found neither: put a CUDA toolkit on PATH, or install the wheels nvidia-cuda-nvcc, "
    "nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl"
)
INCLUDED = re.compile(r'^\s*#\s*include "(.+)"', re.M)
COMMENT = re.compile(r"^[ \t]*//.*", re.M)  # that is a line


@cache
def setup_py() -> dict:
    """The names that setup.py defines, without a build."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(build.ROOT / "setup.py"))


@dataclass(frozen=True)
class Unit:
    """One nvcc command of setup.py."""

    source: str
    name: str
    macros: tuple[str, ...]

    @property
    def object(self) -> Path:
        return UNITS / f"{self.name}.o"

    def ptx(self, arch: str) -> Path:
        return UNITS / f"{self.name}.compute_{arch}.ptx"

    def outputs(self) -> list[Path]:
        return [self.object, *(self.ptx(arch) for arch in ARCHS)]

    def command(self, nvcc: str) -> list[str]:
        flags = [flag for flag in setup_py()["NVCC_FLAGS"] if "-Xptxas" not in flag]
        archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
        return [nvcc, *flags, *self.macros, *archs, "-Icsrc", "-c", self.source]

    def sources(self) -> list[Path]:
        """The unit and the headers of csrc/ that it includes, one by one."""
        listed = [build.ROOT / self.source]
        for path in listed:
            for name in INCLUDED.findall(path.read_text()):
                places = [
                    (folder / name).resolve() for folder in (path.parent, build.ROOT / "csrc")
                ]
                listed += [each for each in places if each.exists() and each not in listed][:1]
        return listed

    def folder(self, version: str | None) -> Path | None:
        """Where its outputs are kept; of any version of nvcc, the last, if there is no nvcc."""
        texts = [COMMENT.sub("", path.read_text()) for path in self.sources()]
        key = kept.key(shlex.join(self.command("nvcc")), *texts)[:32]
        if version is not None:
            return KEPT / f"{key}-{kept.key(version)[:16]}"
        found = sorted(KEPT.glob(f"{key}-*"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None

    def compile(self, nvcc: str | None, version: str | None) -> None:
        folder = self.folder(version)
        if folder is None:
            raise RuntimeError(NO_NVCC)
        stamp = UNITS / f"{self.name}.key"
        if stamp.exists() and stamp.read_text() == folder.name:
            return
        if not folder.exists():
            self.make(self.command(nvcc), folder)
        stamp.unlink(missing_ok=True)
        for path in self.outputs():
            shutil.copyfile(folder / path.name, path)
        stamp.write_text(folder.name)

    def make(self, command: list[str], folder: Path) -> None:
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as name:
            scratch, ready = Path(name, "scratch"), Path(name, "ready")
            scratch.mkdir(), ready.mkdir()
            kept_object = ready / self.object.name
            build.run_tool([*command, "--keep", "--keep-dir", str(scratch), "-o", str(kept_object)])
            for arch in ARCHS:
                made = scratch / f"{Path(self.source).stem}.compute_{arch}.ptx"
                made.rename(ready / self.ptx(arch).name)
            ready.rename(folder)
        by_age = sorted(KEPT.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MOST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


@cache
def units() -> list[Unit]:
    before = os.getcwd()
    os.chdir(build.ROOT)
    found = setup_py()["cuda_units"]()
    os.chdir(before)
    return [Unit(source, Path(stem).name, tuple(macros)) for source, stem, macros in found]


def compile_units() -> None:
    nvcc, version = cuda_headers.nvcc(), None
    if nvcc is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    UNITS.mkdir(parents=True, exist_ok=True)
    with build.alone(), ThreadPoolExecutor(build.JOBS) as pool:
        list(pool.map(lambda unit: unit.compile(nvcc, version), units()))


@dataclass(frozen=True)
class Executor(build.Object):
    """A source of the executor: registers are bytes that it reads as any type."""

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-c")
        return [*command[:at], "-O3", "-fno-strict-aliasing", *command[at:]]


@dataclass(frozen=True)
class Host(build.Object):
    """A source that knows of the kernels' launches, but compiles none of them."""

    @property
    def path(self) -> Path:
        return FOLDER / "objects" / super().path.name

    def command(self) -> list[str]:
        return [*super().command(), "-DEVERY_INSTANCE"]

    def folders(self) -> Sequence[Path]:
        return programs.FOLDERS


FLAVOUR = "plain"


def objects_of(program: str) -> list:
    """A host program of kernels/, without kernels of the project compiled for the host."""
    folder = HERE if program == "dropout" else programs.KERNELS
    host = [f"{folder}/{program}.cpp", f"{programs.KERNELS}/driver.cpp", *programs.CUDA_RUNTIME]
    own = [f"{HERE}/runtime.cpp", f"{HERE}/sequences.cpp", *programs.PLANNER]
    sources = [Host(FLAVOUR, name, kernels=False) for name in (*host, *own)]
    neighbours = Host(FLAVOUR, f"{HERE}/neighbours.cpp", kernels=True)
    stubs = Stubs(FLAVOUR, f"{HERE}/stubs.S", kernels=False)
    return [*sources, *executor(), neighbours, stubs, *build.library_objects(FLAVOUR)]


@dataclass(frozen=True)
class Stubs(build.Object):
    """What host programs name kernels by: a symbol for each entry of the PTX, and their list."""

    def read(self) -> Path:
        names = sorted(
            {name for unit in units() for name in ENTRY.findall(unit.ptx("80").read_text())}
        )
        symbols = "".join(f".globl {name}\n{name}: ud2\n" for name in names)
        pairs = "".join(f".quad {name}, 9{i}f\n" for i, name in enumerate(names))
        texts = "".join(f'9{i}: .asciz "{name}"\n' for i, name in enumerate(names))
        path = FOLDER / "stubs.S"
        text = (
            f'.text\n{symbols}.section .data.rel.ro,"aw"\n.balign 8\n.globl emulated_ptx_kernels\n'
            f"emulated_ptx_kernels:\n{pairs}.quad 0, 0\n{texts}"
            '.section .note.GNU-stack,"",@progbits\n'
        )
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path


def executor() -> list[build.Object]:
    paths = sorted((build.EMULATOR / "ptx").glob("*.cpp"))
    return [Executor(FLAVOUR, build.from_root(path), kernels=False) for path in paths]


def make() -> dict[str, Path]:
    """Compiles what has changed; returns each program's executable."""
    compile_units()
    needed = {program: objects_of(program) for program in PROGRAMS}
    main = Host(FLAVOUR, f"{HERE}/decode.cpp", kernels=False)
    needed["decode"] = [main, *executor(), *build.library_objects(FLAVOUR)]
    build.compile_all(list(dict.fromkeys(each for all in needed.values() for each in all)))
    made = {}
    for program, objects in needed.items():
        launches = [unit.object for unit in units()] if program in PROGRAMS else []
        paths = [*(each.path for each in objects), *launches]
        made[program] = FOLDER / program
        command = [*build.CXX, "-pie", "-pthread", *map(build.from_root, paths)]
        build.link_changed(command, paths, made[program])
    return made


if __name__ == "__main__":
    for path in make().values():
        print(path.relative_to(build.ROOT))
    sys.exit()

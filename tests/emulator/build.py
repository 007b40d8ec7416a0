"""Compiles the execution layer, the kernels' programs and the self tests into build/emulator/.

Three flavours:

    plain  optimised; also what Python loads, package/ and cuda/
    asan   AddressSanitizer and UndefinedBehaviorSanitizer
    race   kernels with -fsanitize=thread, whose callbacks the layer's race checker implements

An object is compiled anew when its command or the content of a file that it includes has changed,
by ccache where there is one. Commands name files from the root of the repository, so that an object
and a program do not depend on where that is. From a shell, `python -m emulator.build [FLAVOUR ...]`
in tests/ builds everything.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulator import kept, mutants
from emulator.cuda_headers import include_dirs

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
CXX = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, ["ccache"]), "g++"]
JOBS = len(os.sched_getaffinity(0))

FLAGS = [
    *(
        "-std=c++20",
        "-fPIC",
        "-fno-semantic-interposition",
        "-fno-omit-frame-pointer",
        "-ftrivial-auto-var-init=pattern",
    ),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-sign-compare"),
    f"-ffile-prefix-map={ROOT}=.",
]


@dataclass(frozen=True)
class Flavour:
    flags: tuple[str, ...]
    kernel_flags: tuple[str, ...] = ()  # of the sources that contain kernels
    link_flags: tuple[str, ...] = ()


SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAVOURS = {
    "plain": Flavour(("-O2", "-g1")),
    "asan": Flavour(("-O1", "-g1", *SANITIZE), link_flags=SANITIZE),
    "race": Flavour(
        ("-O2", "-g1", "-DEMULATOR_RACE"),
        (
            *("-O1", "-fsanitize=thread", "-Wno-tsan"),
            *("--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1"),
        ),
    ),
}


def has_x86_64_v3() -> bool:
    words = Path("/proc/cpuinfo").read_text().split()
    return {"avx2", "bmi2", "fma", "f16c", "movbe"} <= set(words)


def from_root(path: Path) -> str:
    """As the compiler is given it, which runs in ROOT."""
    return os.path.relpath(path, ROOT)


def common_flags() -> list[str]:
    machine = ["-march=x86-64-v3"] if has_x86_64_v3() else []
    system = [f"-isystem{path}" for path in include_dirs()]
    folders = [mutants.COPIES, ROOT / "csrc", ROOT / "tests"]
    includes = [*(f"-I{from_root(folder)}" for folder in folders), *system]
    return [*FLAGS, *machine, *includes]


SUFFIXES = {".cpp", ".S"}
LIBRARY = ("machine", "threads", "memory", "copies", "matrix", "counts")


def library_sources(flavour: str) -> list[Path]:
    folders = [EMULATOR, *(EMULATOR / name for name in LIBRARY)]
    if flavour == "race":
        folders.append(EMULATOR / "race")
    return sorted(
        path for folder in folders for path in folder.iterdir() if path.suffix in SUFFIXES
    )


WHOLE_OP = "lora_linear_sequence"
SELFTEST_MAIN = "selftests/selftest.cpp"
PLANNER = [
    f"../../csrc/plan/{name}.cpp"
    for name in ("plan", "plan_prediction", "decode_plan", "grouped_plan")
]


def source_of(program: str) -> str:
    """The host program of a kernel, by its name."""
    return f"kernels/{program}.cpp"


def selftests(flavour: str) -> list[str]:
    """Those of a flavour: with race or asan in its name, one is for that flavour alone."""
    found = sorted(str(path.relative_to(EMULATOR)) for path in EMULATOR.glob("selftests/*.cpp"))
    others = [name for name in FLAVOURS if name != flavour]
    return [
        name
        for name in found
        if name != SELFTEST_MAIN and not set(Path(name).stem.split("_")) & set(others)
    ]


@dataclass(frozen=True)
class Object:
    """One compilation, for a flavour: the source is relative to tests/emulator/."""

    flavour: str
    source: str
    kernels: bool

    @property
    def path(self) -> Path:
        return BUILD / self.flavour / "objects" / (self.source.replace("/", "-") + ".o")

    def command(self) -> list[str]:
        flavour = FLAVOURS[self.flavour]
        flags = [*flavour.flags, *(flavour.kernel_flags if self.kernels else ())]
        source = from_root(mutants.copy_of(EMULATOR / self.source))
        return [*CXX, *common_flags(), *flags, "-MMD", "-c", source, "-o", from_root(self.path)]

    def key(self) -> str:
        """A hash of the command and of the files that the last compilation read, "" without one."""
        read = self.dependencies()
        if not read or not all(path.exists() for path in read):
            return ""
        return kept.key(shlex.join(self.command()), *map(kept.content, read))

    def dependencies(self) -> list[Path]:
        """The files that the last compilation read."""
        depfile = self.path.with_suffix(".d")
        if not depfile.exists():
            return []
        text = depfile.read_text().replace("\\\n", " ")
        return [ROOT / name for name in text.partition(": ")[2].split()]

    def compile(self) -> None:
        stamp = self.path.with_suffix(".key")
        if self.path.exists() and stamp.exists() and stamp.read_text() == self.key() != "":
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        started = time.time()
        run_tool(self.command())
        if all(path.stat().st_mtime < started for path in self.dependencies()):
            stamp.write_text(self.key())


def compile_all(objects: Sequence[Object]) -> None:
    """Compiles what has changed, in this order, after the copies that it includes are written."""
    with alone():
        mutants.write_copies()
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(Object.compile, objects))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time builds: tests run beside each other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_tool(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\nfailed:\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def library_objects(flavour: str) -> list[Object]:
    sources = [str(path.relative_to(EMULATOR)) for path in library_sources(flavour)]
    return [Object(flavour, source, kernels=False) for source in sources]


def kernel_objects(flavour: str) -> list[Object]:
    """The kernels of all programs, kernels/instances.h, for those that launch them all."""
    sources = [f"kernels/{name}_kernels.cpp" for name in mutants.PROGRAMS]
    return [Object(flavour, source, kernels=True) for source in sources]


def objects_of(flavour: str, program: str) -> list[Object]:
    objects = library_objects(flavour)
    if not program.startswith("kernels/"):
        main = Object(flavour, SELFTEST_MAIN, kernels=False)
        return [Object(flavour, program, kernels=True), main, *objects]
    kernels = program.replace(".cpp", "_kernels.cpp")
    sources = [program, "kernels/driver.cpp", *PLANNER]
    host = [Object(flavour, source, kernels=False) for source in sources]
    linked = kernel_objects(flavour) if program == source_of(WHOLE_OP) else []
    return [Object(flavour, kernels, kernels=True), *linked, *host, *objects]


def build_programs(wanted: list[tuple[str, str]]) -> list[Path]:
    """Compiles and links programs, given as (flavour, source), and returns the executables."""
    needed = {key: objects_of(*key) for key in wanted}
    unique = dict.fromkeys(item for objects in needed.values() for item in objects)
    # The long compilations first, so that no core is idle at the end.
    ordered = sorted(unique, key=lambda item: not item.kernels)
    compile_all(ordered)
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda key: link(*key, needed[key]), wanted))


def link(flavour: str, program: str, objects: list[Object]) -> Path:
    executable = BUILD / flavour / Path(program).stem
    inputs = [from_root(item.path) for item in objects]
    flags = ["-pie", *FLAVOURS[flavour].link_flags, "-pthread"]
    link_changed([*CXX, *flags, *inputs], [item.path for item in objects], executable)
    return executable


def link_changed(command: list[str], inputs: Sequence[Path], output: Path) -> None:
    """Links unless the output was linked by this command from these objects."""
    stamp = output.with_suffix(".linked")
    name = kept.key(shlex.join(command), *map(kept.content, inputs))
    if output.exists() and stamp.exists() and stamp.read_text() == name:
        return
    partial = output.with_suffix(f".{os.getpid()}")
    run_tool([*command, "-o", from_root(partial)])
    partial.replace(output)
    stamp.write_text(name)


if __name__ == "__main__":
    flavours = sys.argv[1:] or list(FLAVOURS)
    programs = [
        (flavour, name)
        for flavour in flavours
        for name in [*map(source_of, mutants.PROGRAMS), *selftests(flavour)]
    ]
    for built in build_programs(programs):
        print(built.relative_to(ROOT))

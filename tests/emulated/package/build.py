"""Builds build/emulator/package/lora_ext: the package, with the kernels running in emulation.

The Python sources and the C++ objects are the package's own, and device.cpp stands for
csrc/kernels/launch/: planner, tensors, workspace, checks and autograd run as they do on a GPU, on
CPU tensors.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch.utils import cpp_extension

from emulated import mutants, programs
from emulator import build, kept

PACKAGE = build.BUILD / "package"
FLAVOUR = "plain"
KERNELS = f"{programs.KERNELS}/{programs.WHOLE_OP}_kernels.cpp"
DEVICE = "tests/emulated/package/device.cpp"
NO_CUDA = "csrc/kernels/launch/none.cpp"
# As setup.py names it.
BUILT = build.ROOT.joinpath(
    "build", f"temp-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"
)
# What Python reads there: the package, what the tests here call, and the op's own tests.
CALLS = [f"tests/emulated/{name}.py" for name in ("cuda/calls", "cuda/counted", "package/calls")]
PACKAGE_FILES = ("lora_ext", "tests/emulated/comparisons.py", *CALLS)
OP_TESTS = (
    "op",
    "conftest.py",
    "helpers.py",
    "other_library.py",
    "op_calls.py",
    "rest.py",
    "two_processes.py",
)
# How many tests of each file pass there at least.
EXPERTS_TESTS = {
    "experts/test_experts_grouped.py": 60,
    "experts/test_experts_numbers.py": 30,
    "experts/test_experts_dropout.py": 8,
    "experts/test_experts_compile.py": 1,
}
HELPERS = ("experts/expert_cases.py", "experts/expert_helpers.py", "peft_helpers.py")
EXPERTS_FILES = (*EXPERTS_TESTS, *HELPERS)
TEST_FILES = ("pyproject.toml", *(f"tests/{name}" for name in (*OP_TESTS, *EXPERTS_FILES)))


@dataclass(frozen=True)
class TorchObject(programs.Object):
    """A source that includes torch, or is compiled with those that do."""

    @property
    def path(self) -> Path:
        return build.BUILD / "torch" / "objects" / super().path.name

    def command(self) -> list[str]:
        folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        flags = ["-DTORCH_EXTENSION_NAME=_C", "-ffp-contract=off", "-fopenmp", "-w", "-DNDEBUG"]
        return [*super().command(), *flags, *(f"-isystem{path}" for path in folders)]


@dataclass(frozen=True)
class BuiltObject(programs.Object):
    """A source as setup.py has compiled it."""

    @property
    def path(self) -> Path:
        return (BUILT / self.source).with_suffix(".o")


def sources(pattern: str) -> list[str]:
    """Of csrc/, as `build.Object` takes them."""
    return sorted(map(build.from_root, (build.ROOT / "csrc").glob(pattern)))


def what_built_objects_read() -> dict[str, set[Path]]:
    """The files of csrc/ that each object of the normal build was made of, by its source, one file
    or some of a folder. That build is first brought up to date. Nothing where there was no ninja,
    which alone knows.
    """
    listed = BUILT / "build.ninja"
    if not listed.exists():
        return {}
    found = shutil.which("ninja")
    ninja = [*([found] if found else [sys.executable, "-m", "ninja"]), "-C", str(BUILT)]
    build.run_tool([*ninja, "-j", str(build.JOBS)])
    compiled = re.findall(r"^build (.+): compile (.+)$", listed.read_text(), re.MULTILINE)
    source_of = {
        Path(os.path.normpath(item)): build.from_root(Path(source)) for item, source in compiled
    }
    command = [*ninja, "-t", "deps"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read: dict[str, set[Path]] = {}
    files: set[Path] = set()
    for line in said.splitlines():
        name, is_object, _ = line.partition(": #deps")
        path = Path(os.path.normpath(BUILT / name.strip()))  # ccache may name it from there
        if is_object:
            files = set()
            if path in source_of:
                read[source_of[path]] = files
        elif path.is_relative_to(build.ROOT / "csrc"):
            files.add(path)
    return read


def torchs_half() -> list[build.Object]:
    """csrc/ without kernels/launch/: the objects of the normal build, whatever its device library.

    Compiled here is what has a copy with mutants or includes one: so in one program a function of a
    header is always the same.
    """
    with build.alone():
        mutants.write_copies()
        read = what_built_objects_read()

    def made(name: str) -> build.Object:
        as_built = all(mutants.copy_of(path) == path for path in read[name])
        return (BuiltObject if as_built else TorchObject)(FLAVOUR, name, kernels=False)

    if not read:
        names = [name for name in sources("**/*.cpp") if name != NO_CUDA]
        return [TorchObject(FLAVOUR, name, kernels=False) for name in names]
    return [made(name) for name in read if name != NO_CUDA]


def objects() -> list[build.Object]:
    return [
        programs.Object(FLAVOUR, KERNELS, kernels=True),
        *programs.kernel_objects(FLAVOUR),
        *torchs_half(),
        TorchObject(FLAVOUR, DEVICE, kernels=False),
        *programs.library_objects(FLAVOUR),
    ]


def make() -> Path:
    """Compiles what has changed and copies the rest; returns the folder to run Python in."""
    return link(objects(), PACKAGE)


def link(compiled: list[build.Object], package: Path) -> Path:
    """Makes a package in a folder of which these objects are the extension."""
    programs.compile_all([each for each in compiled if not isinstance(each, BuiltObject)])
    with build.alone():
        for name in (*PACKAGE_FILES, *TEST_FILES):
            copy(build.ROOT / name, package / name)
        library = package / "lora_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        inputs = [each.path for each in compiled]
        folders = cpp_extension.library_paths()
        linked = [word for path in folders for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
        linked += [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
        linked += ["-Wl,-Bsymbolic"]  # a CUDA runtime that torch brings answers no call of ours
        command = [*build.CXX, "-shared", *map(build.from_root, inputs), *linked]
        build.link_changed(command, inputs, library)
    return package


def copy(source: Path, target: Path) -> None:
    """What has changed of a file or a folder; what is not there goes."""

    def files(folder: Path) -> set[Path]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {
            path
            for path in found
            if not {"__pycache__", "results"} & set(path.parts)
            and path.suffix not in (".so", ".linked")
        }

    if source.is_dir():
        wanted = files(source)
        for path in files(target) - wanted if target.exists() else ():
            (target / path).unlink()
        for path in wanted:
            copy(source / path, target / path)
    elif not target.exists() or kept.content(source) != kept.content(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@cache
def state(package: Path, names: tuple[str, ...]) -> str:
    """A hash of these files and of the packages that are installed, by their versions."""
    files = [path for name in names for path in [package / name, *(package / name).rglob("*")]]
    read = [path for path in files if path.is_file() and path.suffix in (".py", ".so", ".toml")]
    installed = {f"{each.name} {each.version}" for each in metadata.distributions()}
    return kept.key(sys.version, *sorted(installed), *map(kept.content, sorted(read)))


# Imports torch, which takes longer than most code that runs here, and forks for each piece of code.
# Not for cuda/: a torch that has forked knows of no device that is registered later.
FORKS = """
import json, os, sys
import pytest, torch
for line in sys.stdin:
    code, environment, *outputs = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate([os.devnull, *outputs]):
    os.dup2(os.open(path, os.O_RDWR), number)
os.environ.clear()
os.environ.update(environment)
exec(code)
"""


@cache
def forks() -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", FORKS], subprocess.PIPE
    there = {**os.environ, "PYTHONPATH": "tests"}
    return subprocess.Popen(command, cwd=PACKAGE, env=there, stdin=pipe, stdout=pipe, text=True)


def fork(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs code as `python -c` would."""
    server = forks()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        asked = json.dumps([code, environment, out.name, err.name])
        print(asked, file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read(), err.read())


def run(
    arguments: list[str], package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess:
    """Runs Python in the emulated package. What passed there before is not run again, but where
    it is told of a temporary folder: then it reads or writes files.
    """
    command = [sys.executable, *arguments]
    given = [f"{name}={value}" for name, value in sorted(environment.items())]
    read = (*PACKAGE_FILES, *(TEST_FILES if "pytest" in arguments else ()))
    name = kept.key(state(package, read), package.name, *arguments, *given)
    alone = not any(tempfile.gettempdir() in word for word in [*arguments, *given])
    found = kept.load(name) if alone else None
    if found is not None:
        return subprocess.CompletedProcess(command, 0, *found)
    environment = {**os.environ, **environment}
    if arguments[0] == "-c" and package == PACKAGE:
        done = fork(arguments[1], environment)
    else:
        done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    if alone and done.returncode == 0:
        kept.store(name, [done.stdout, done.stderr])
    return done


if __name__ == "__main__":
    print(make())

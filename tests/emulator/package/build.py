"""Builds build/emulator/package/lora_ext: the package, with the kernels running in emulation.

The Python sources and the C++ objects are the package's own, and device.cpp stands for csrc/cuda/:
planner, tensors, workspace, checks and autograd run as they do on a GPU, on CPU tensors.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from emulator import build, kept, mutants

PACKAGE = build.BUILD / "package"
FLAVOUR = "plain"
KERNELS = "kernels/lora_linear_sequence_kernels.cpp"
DEVICE = "package/device.cpp"
NO_CUDA = "../../csrc/cuda/none.cpp"
# As setup.py names it.
BUILT = build.ROOT.joinpath(
    "build", f"temp-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"
)
COPIED = ("lora_ext", "tests", "benchmarks", "pyproject.toml")


@dataclass(frozen=True)
class TorchObject(build.Object):
    """A source that includes torch, or is compiled with those that do."""

    @property
    def path(self) -> Path:
        return build.BUILD / "torch" / "objects" / super().path.name

    def command(self) -> list[str]:
        folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        flags = ["-DTORCH_EXTENSION_NAME=_C", "-ffp-contract=off", "-fopenmp", "-w"]
        return [*super().command(), *flags, *(f"-isystem{path}" for path in folders)]


@dataclass(frozen=True)
class BuiltObject(build.Object):
    """A source as setup.py has compiled it."""

    @property
    def path(self) -> Path:
        source = (build.EMULATOR / self.source).resolve()
        return BUILT / source.relative_to(build.ROOT).with_suffix(".o")


def sources(pattern: str) -> list[str]:
    """Of csrc/, as `build.Object` takes them."""
    found = sorted((build.ROOT / "csrc").glob(pattern))
    return [f"../../{path.relative_to(build.ROOT)}" for path in found]


def what_built_objects_read() -> dict[Path, set[Path]]:
    """The files of csrc/ that each object of the normal build was made of, which is first brought
    up to date. Nothing where it was compiled without ninja, which alone knows."""
    if not (BUILT / "build.ninja").exists():
        return {}
    found = shutil.which("ninja")
    ninja = [*([found] if found else [sys.executable, "-m", "ninja"]), "-C", str(BUILT)]
    build.run_tool([*ninja, "-j", str(build.JOBS)])
    command = [*ninja, "-t", "deps"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read: dict[Path, set[Path]] = {}
    for line in listed.splitlines():
        name, is_object, _ = line.partition(": #deps")
        path = Path(os.path.normpath(BUILT / name.strip()))  # ccache may name it from there
        if is_object:
            files = read.setdefault(path, set())
        elif path.is_relative_to(build.ROOT / "csrc"):
            files.add(path)
    return read


def torchs_half() -> list[build.Object]:
    """csrc/ without csrc/cuda/: the objects of the normal build, whatever its device library is.

    Compiled here is what has a copy with mutants or includes one: so in one program a function of a
    header is always the same.
    """
    with build.alone():
        mutants.write_copies()
        read = what_built_objects_read()

    def made(name: str) -> build.Object:
        built = BuiltObject(FLAVOUR, name, kernels=False)
        files = read.get(built.path, set())
        if files and all(mutants.copy_of(path) == path for path in files):
            return built
        return TorchObject(FLAVOUR, name, kernels=False)

    return [made(name) for name in sources("**/*.cpp") if name != NO_CUDA]


def objects() -> list[build.Object]:
    return [
        build.Object(FLAVOUR, KERNELS, kernels=True),
        *build.kernel_objects(FLAVOUR),
        *torchs_half(),
        TorchObject(FLAVOUR, DEVICE, kernels=False),
        *build.library_objects(FLAVOUR),
    ]


def make() -> Path:
    """Compiles what has changed and copies the rest; returns the folder to run Python in."""
    return link(objects(), PACKAGE)


def link(compiled: list[build.Object], package: Path) -> Path:
    """Makes a package in a folder of which these objects are the extension."""
    build.compile_all([each for each in compiled if not isinstance(each, BuiltObject)])
    with build.alone():
        for name in COPIED:
            copy(build.ROOT / name, package / name)
        library = package / "lora_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        inputs = [each.path for each in compiled]
        linked = [f"-L{path}" for path in cpp_extension.library_paths()]
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


def run(
    arguments: list[str], package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess:
    """Runs Python in the emulated package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package,
        env={**build.os.environ, **environment},
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    print(make())

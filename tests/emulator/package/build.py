"""Builds build/emulator/package/lora_ext: the package, with the kernels running in emulation.

The Python and C++ sources are the package's own, and device.cpp stands for csrc/cuda/: planner,
tensors, workspace, checks and autograd run as they do on a GPU, on CPU tensors.
"""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from emulator import build, kept

PACKAGE = build.BUILD / "package"
FLAVOUR = "plain"
KERNELS = "kernels/lora_linear_sequence_kernels.cpp"
DEVICE = "package/device.cpp"
COPIED = ("lora_ext", "tests", "benchmarks", "pyproject.toml")


@dataclass(frozen=True)
class TorchObject(build.Object):
    """A source that includes torch, or is compiled with those that do."""

    @property
    def path(self) -> Path:
        return build.BUILD / "torch" / "objects" / super().path.name

    def command(self) -> list[str]:
        folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        macros = ["-DLORA_EXT_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C", "-ffp-contract=off", "-w"]
        return [*super().command(), *macros, "-fopenmp", *(f"-isystem{path}" for path in folders)]


def sources(pattern: str) -> list[str]:
    """Of csrc/, as `build.Object` takes them."""
    found = sorted((build.ROOT / "csrc").glob(pattern))
    return [f"../../{path.relative_to(build.ROOT)}" for path in found]


def objects() -> list[build.Object]:
    with_torch = [*sources("**/*.cpp"), DEVICE]
    for name in ("library/dropout_launch", "launch/dequantize_launch"):
        with_torch.remove(f"../../csrc/{name}.cpp")
    return [
        build.Object(FLAVOUR, KERNELS, kernels=True),
        *build.kernel_objects(FLAVOUR),
        *(TorchObject(FLAVOUR, name, kernels=False) for name in with_torch),
        *build.library_objects(FLAVOUR),
    ]


def make() -> Path:
    """Compiles what has changed and copies the rest; returns the folder to run Python in."""
    return link(objects(), PACKAGE)


def link(compiled: list[build.Object], package: Path) -> Path:
    """Makes a package in a folder of which these objects are the extension."""
    build.compile_all(compiled)
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

"""The package's kernels in the execution layer: what emulator/ compiles and links for them.

A program of kernels/ is three things: the host program, the kernels that it launches, and the
sources of csrc/kernels/plan/. The copies of csrc/ that mutants are planted in come first on the
include path. `python -m emulated.programs [FLAVOUR ...]`, with PYTHONPATH=tests, builds all.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulated import mutants
from emulator import build

FOLDERS = (*build.FOLDERS, build.ROOT / "tests")
KERNELS = "tests/emulated/kernels"
WHOLE_OP = "lora_linear_sequence"
CUDA_RUNTIME = [  # what stands for it
    f"tests/emulated/cuda/{name}.cpp"
    for name in ("counting", "driver_state", "launches", "runtime")
]
SEQUENCES = (WHOLE_OP, "lora_grouped_sequence")  # which launch the kernels of all programs
PLANNER = [
    str(path.relative_to(build.ROOT))
    for path in sorted((build.ROOT / "csrc" / "kernels" / "plan").glob("*.cpp"))
    if path.stem != "autotune_cache"  # which programs do not ask
]
KNOWN_FAULT = "tests/emulated/mutants/known_fault.cpp"


@dataclass(frozen=True)
class Object(build.Object):
    """A compilation in which mutants can be planted."""

    def read(self) -> Path:
        return mutants.copy_of(super().read())

    def folders(self) -> Sequence[Path]:
        return (mutants.COPIES, *FOLDERS)


def library_objects(flavour: str) -> list[build.Object]:
    return [*build.library_objects(flavour), Object(flavour, KNOWN_FAULT, kernels=False)]


def kernel_objects(flavour: str) -> list[Object]:
    """The kernels of all programs, kernels/instances.h, for those that launch them all."""
    sources = [f"{KERNELS}/{name}_kernels.cpp" for name in mutants.PROGRAMS]
    return [Object(flavour, source, kernels=True) for source in sources]


def objects_of(flavour: str, program: str) -> list[build.Object]:
    own = Object(flavour, f"{KERNELS}/{program}_kernels.cpp", kernels=True)
    linked = kernel_objects(flavour) if program in SEQUENCES else []
    sources = [f"{KERNELS}/{program}.cpp", f"{KERNELS}/driver.cpp", *PLANNER]
    host = [Object(flavour, source, kernels=False) for source in sources]
    return list(dict.fromkeys([own, *linked, *host, *library_objects(flavour)]))


def compile_all(objects: Sequence[build.Object]) -> None:
    """Compiles what has changed, in this order, after the copies that it includes are written."""
    write_copies()
    build.compile_all(objects)


def write_copies() -> None:
    with build.alone():
        mutants.write_copies()


def build_programs(wanted: Sequence[build.Key]) -> list[Path]:
    """Compiles and links programs, given as (flavour, name), and returns the executables."""
    write_copies()
    return build.build_programs({key: objects_of(*key) for key in wanted})


if __name__ == "__main__":
    flavours = sys.argv[1:] or list(build.FLAVOURS)
    wanted = [(flavour, name) for flavour in flavours for name in mutants.PROGRAMS]
    for built in build_programs(wanted):
        print(built.relative_to(build.ROOT))

"""Builds build/emulator/cuda/lora_ext: the package with kernels/launch/ itself, on our runtime.

All sources are the package's own. runtime.cpp stands for the CUDA runtime and device.cpp for the
CUDA device of torch, so that a call on CUDA tensors goes the way it goes on a GPU, from the op to
the CUDA call, and the kernels run in the execution layer.
"""

from dataclasses import dataclass
from pathlib import Path

from emulated import programs
from emulated.package.build import FLAVOUR, KERNELS, TorchObject, link, sources, torchs_half
from emulator import build

PACKAGE = build.BUILD / "cuda"


@dataclass(frozen=True)
class CudaObject(programs.Object):
    """A source of csrc/kernels/launch/, whose instances are linked: the sequences have them all."""

    def command(self) -> list[str]:
        included = [
            build.ROOT / "tests" / "emulated" / "cuda" / "runtime.h",
            build.ROOT / programs.KERNELS / "instances.h",
        ]
        macros = ["-DLORA_EXT_WITH_SM90A", "-DEVERY_INSTANCE", "-w"]
        command = super().command()
        at = command.index("-c")
        includes = [word for path in included for word in ("-include", str(path))]
        return [*command[:at], *macros, *includes, "-x", "c++", *command[at:]]


def objects() -> list[build.Object]:
    return [
        *(CudaObject(FLAVOUR, name, kernels=True) for name in sources("kernels/launch/*.cu")),
        *torchs_half(),
        TorchObject(FLAVOUR, "tests/emulated/cuda/device.cpp", kernels=False),
        *(programs.Object(FLAVOUR, name, kernels=False) for name in programs.CUDA_RUNTIME),
        programs.Object(FLAVOUR, KERNELS, kernels=True),
        *programs.kernel_objects(FLAVOUR),
        *programs.library_objects(FLAVOUR),
    ]


def make() -> Path:
    """Compiles what has changed and copies the rest; returns the folder to run Python in."""
    return link(objects(), PACKAGE)


if __name__ == "__main__":
    print(make())

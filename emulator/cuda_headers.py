"""Finds CUDA's headers, which kernels include on the host too; nvcc and disassemblers are optional.

    python emulator/cuda_headers.py    prints the compiler flags, or what to install

The headers come from a toolkit (nvcc on PATH, CUDA_HOME, /usr/local/cuda*) or, without one, from
three wheels of PyPI, 7 MB together. Wheels count wherever this Python finds packages: also those of
an environment that lends them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# One header that g++ needs of each wheel. cuda_bf16.h includes the other two.
HEADERS = {
    "cuda_bf16.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}


class CudaHeadersNotFound(RuntimeError):
    """Its text says what to install."""


def nvcc() -> str | None:
    """The path of nvcc, or None: the host build needs its headers alone."""
    return in_toolkits("nvcc")


def disassembler(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump, which not every toolkit has, or None."""
    beside_nvcc = re.findall(r"^#\$ _HERE_=(.+)", dry_run(), re.M)
    wheels = [str(path) for path in of_wheels("bin")]
    return in_toolkits(name) or shutil.which(name, path=os.pathsep.join([*beside_nvcc, *wheels]))


def in_toolkits(program: str) -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", ""), *(f"{path}/bin" for path in local_toolkits())]
    return shutil.which(program, path=os.pathsep.join(folders))


def dry_run() -> str:
    """What nvcc would do: it may be a wrapper, and this says where the toolkit is. Or ""."""
    compiler = nvcc()
    if compiler is None:
        return ""
    command = [compiler, "--dryrun", "x.cu"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def local_toolkits() -> list[Path]:
    """The toolkits where NVIDIA's installers put them, `cuda` and then the newest version first."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)] or [sys.maxsize]

    return sorted(Path("/usr/local").glob("cuda*"), key=version, reverse=True)


def toolkit_includes() -> list[Path]:
    """The include folders of each toolkit, the one of nvcc first."""
    folders = [Path(flag) for flag in re.findall(r'^#\$ INCLUDES="-I([^"]+)"', dry_run(), re.M)]
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"], "include"))
    folders += [path / "include" for path in local_toolkits()]
    return folders


def of_wheels(folder: str) -> list[Path]:
    """A folder of NVIDIA's wheels: nvidia/cu13/include, say; before 13, one of each wheel."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or []] if spec else []
    return sorted((path for root in roots for path in root.glob(f"*/{folder}")), reverse=True)


def choose(folders: list[Path]) -> tuple[list[Path], list[str]]:
    """Those of the folders that have the headers, and the headers that none has."""
    chosen: list[Path] = []
    missing = []
    for header in HEADERS:
        having = [folder for folder in folders if (folder / header).is_file()]
        if not having:
            missing.append(header)
        elif not any(folder in chosen for folder in having):
            chosen.append(having[0])
    return chosen, missing


def include_dirs() -> list[Path]:
    """The folders to compile with; raises CudaHeadersNotFound, which says what to install."""
    for toolkit in toolkit_includes():
        chosen, missing = choose([toolkit])
        if not missing:
            return [path.resolve() for path in chosen]
    chosen, missing = choose(of_wheels("include"))
    if missing:
        packages = " ".join(HEADERS[header] for header in missing)
        raise CudaHeadersNotFound(
            "expected CUDA's headers in a toolkit (nvcc on PATH, CUDA_HOME, /usr/local/cuda*) or"
            f" in wheels, but found no {', '.join(missing)}: pip install {packages}"
        )
    return [path.resolve() for path in chosen]


if __name__ == "__main__":
    try:
        print(" ".join(f"-isystem {path}" for path in include_dirs()))
    except CudaHeadersNotFound as error:
        sys.exit(str(error))

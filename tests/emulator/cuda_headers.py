"""Finds CUDA's headers, which kernels include on the host too, and nvcc, which is optional.

    python tests/emulator/cuda_headers.py    prints the compiler flags, or what to install

The headers come from a toolkit (nvcc on PATH, CUDA_HOME, /usr/local/cuda*) or, without one, from
three wheels of PyPI, 7 MB together.
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
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", ""), *(f"{path}/bin" for path in local_toolkits())]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def local_toolkits() -> list[Path]:
    """The toolkits where NVIDIA's installers put them, `cuda` and then the newest version first."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)] or [sys.maxsize]

    return sorted(Path("/usr/local").glob("cuda*"), key=version, reverse=True)


def toolkit_includes() -> list[Path]:
    """The include folders of each toolkit, the one of nvcc first."""
    folders = []
    compiler = nvcc()
    if compiler:  # it may be a wrapper; its dry run says where the toolkit is
        command = [compiler, "--dryrun", "x.cu"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        folders += [Path(flag) for flag in re.findall(r'^#\$ INCLUDES="-I([^"]+)"', said, re.M)]
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"], "include"))
    folders += [path / "include" for path in local_toolkits()]
    return folders


def wheel_includes() -> list[Path]:
    """The include folders of NVIDIA's wheels: nvidia/cu13/include; before 13, one of each wheel."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or []] if spec else []
    return sorted((path for root in roots for path in root.glob("*/include")), reverse=True)


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
    chosen, missing = choose(wheel_includes())
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

"""Compiles conformance.cu and runs it.

    python -m emulator.conformance.produce [FOLDER]    (in tests/, on a machine with a GPU)

writes the GPU's golden vectors into golden/, or into FOLDER. Commit the file.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from emulator import build, mutants
from emulator.conformance import vectors
from emulator.cuda_headers import nvcc

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "conformance.cu"
GOLDEN = FOLDER / "golden"


def compile_for_emulator(source: Path, target: Path, *flags: str) -> Path:
    mutants.write_copies()
    build.run_tool(
        [*build.CXX, *flags, *build.common_flags(), "-c", str(source), "-o", str(target)]
    )
    return target


def library() -> dict[str, Path]:
    """The execution layer's objects by the name of their source, compiled as far as needed."""
    objects = build.library_objects("plain")
    build.compile_all(objects)
    return {item.source: item.path for item in objects}


def link_for_emulator(objects: list[Path], target: Path) -> Path:
    build.run_tool([*build.CXX, "-pie", *map(str, objects), "-o", str(target), "-pthread"])
    return target


def compile_cases_for_emulator(target: Path) -> Path:
    """conformance.cu as C++."""
    return compile_for_emulator(SOURCE, target, "-O0", "-DCONFORMANCE_ARCH=90", "-x", "c++")


def build_for_gpu(target: Path, compute_capability: int) -> Path:
    """Compiles conformance.cu for a GPU: for 90 all cases, for any other those of sm_80."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("expected nvcc on PATH or a toolkit in CUDA_HOME, but found none")
    sm90 = compute_capability == 90
    arch = "90a" if sm90 else str(compute_capability)
    flags = ["-std=c++20", f"-DCONFORMANCE_ARCH={90 if sm90 else 80}"]
    flags += [f"-I{build.ROOT / 'csrc'}", f"-I{build.ROOT / 'tests'}", "-cudart=static"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    build.run_tool([compiler, *flags, "-o", str(target), str(SOURCE)])
    return target


def run(program: Path, target: Path, *options: str) -> Path:
    """Runs the program, which writes `target`, and prints the cases' names as they begin.

    Raises:
        RuntimeError: it failed; the last name printed is that of the case which did. `target` has
            those before it.
    """
    done = subprocess.run([program, target, *options], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} exited with {done.returncode}:\n{done.stderr}")
    return target


def gpu() -> tuple[str, int]:
    """Name and compute capability of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        name, capability = said.strip().rsplit(", ", 1)
        return name, int(capability.replace(".", ""))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"expected a GPU that nvidia-smi sees, but got: {error}") from error


def main(folder: Path) -> Path:
    """Writes the GPU's vectors in place, so that what a hang leaves of them is there."""
    name, capability = gpu()
    target = folder / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    with tempfile.TemporaryDirectory() as scratch:
        print("compiling", flush=True)
        run(build_for_gpu(Path(scratch, "conformance"), capability), target)
    print(f"{len(vectors.load(target).cases)} cases", flush=True)
    return target


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN))
    except RuntimeError as error:
        sys.exit(str(error))

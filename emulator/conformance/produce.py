"""Compiles conformance.cu and runs it.

    python -m emulator.conformance.produce [FOLDER]    (on a machine with a GPU)

writes the GPU's golden vectors into golden/, or into FOLDER. Commit the file.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from emulator import build
from emulator.conformance import vectors
from emulator.cuda_headers import nvcc

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "conformance.cu"
GOLDEN = FOLDER / "golden"
CASE_SECONDS = 10.0  # of one case at most; each takes milliseconds


def compile_for_emulator(source: Path, target: Path, *flags: str) -> Path:
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
    flags += [*(f"-I{folder}" for folder in build.FOLDERS), "-cudart=static"]
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


def run_cases(program: Path, target: Path, seconds: float = CASE_SECONDS) -> list[str]:
    """Runs the program; after a case that fails or hangs a new process goes on with the next.

    Returns the names of those. `target` has all others, written anew whenever a process ends.
    """
    part = target.with_suffix(".part")
    lost: list[str] = []
    written: dict = {}
    while True:
        command = [program, part, *(["--after", lost[-1]] if lost else [])]
        name = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            watch = threading.Timer(2 * seconds, running.kill)  # it starts, too
            watch.start()
            for line in running.stdout:
                watch.cancel()
                watch = threading.Timer(seconds, running.kill)
                watch.start()
                name = line.strip()
                print(name, flush=True)
            failed = running.wait() != 0
            watch.cancel()
        if part.exists():
            found = json.loads(part.read_text())
            names = [case["name"] for case in found["cases"]]
            whole = names.index(name) if failed and name in names else len(names)
            found["cases"] = [*written.get("cases", []), *found["cases"][:whole]]
            written = found
            target.write_text(json.dumps(written, indent=1))
            part.unlink()
        if not failed:
            return lost
        if not name:
            raise RuntimeError(f"{program.name} exited with {running.returncode} before a case")
        lost.append(name)
        print(f"lost: {name} (exit status {running.returncode})", flush=True)


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
    """Writes the GPU's vectors in place, so that what a hang leaves of them is there.

    Raises:
        RuntimeError: there is no GPU; or cases failed, which the file lacks.
    """
    name, capability = gpu()
    target = folder / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    with tempfile.TemporaryDirectory() as scratch:
        print("compiling", flush=True)
        lost = run_cases(build_for_gpu(Path(scratch, "conformance"), capability), target)
    print(f"{len(vectors.load(target).cases)} cases", flush=True)
    if lost:
        raise RuntimeError(f"{target} lacks what failed: {', '.join(lost)}")
    return target


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN))
    except RuntimeError as error:
        sys.exit(str(error))

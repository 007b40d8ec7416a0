"""What the oracles' tests share: NVIDIA's headers, and the compilers with the right flags."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from emulator import cuda_headers

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
CSRC = ROOT / "csrc"


def cutlass_include() -> Path:
    """The headers in the wheel nvidia-cutlass; skips the test without them."""
    spec = importlib.util.find_spec("cutlass_library")
    folder = Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None
    if folder is None or not (folder / "cute" / "tensor.hpp").is_file():
        pytest.skip("the oracle is CUTLASS' headers: pip install nvidia-cutlass==4.2.0.0")
    return folder


def functions_of_headers() -> set[str]:
    """Every function of csrc/ptx/, by name."""
    declared = re.compile(r"^LORA_EXT_DEVICE [\w ]+?[ *&]+(\w+)\(", re.MULTILINE)
    headers = (CSRC / "ptx").glob("*.h")
    return {name for header in headers for name in declared.findall(header.read_text())}


def run(command: list[str]) -> str:
    """Runs a compiler or a program; returns what it printed, and fails the test if it failed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def compile_to_ptx(target: Path, *flags: str, csrc: Path = CSRC) -> str:
    """The PTX of asm_provenance.cu for sm_90a; skips the test without nvcc."""
    nvcc = cuda_headers.nvcc()
    if nvcc is None:
        pytest.skip("the PTX is nvcc's: put nvcc on PATH or its toolkit in CUDA_HOME")
    command = [nvcc, "-std=c++20", "-DNDEBUG", "-w", f"-I{csrc}", *flags]
    command += ["-gencode=arch=compute_90a,code=compute_90a", "-ptx", "-o", str(target)]
    run([*command, str(FOLDER / "asm_provenance.cu")])
    return target.read_text()

"""Installs a wheel where there is nothing else and no compiler, and runs the package's tests there.

    python scripts/check_wheel.py dist/lora_ext-...whl [--folders op contract] [arguments of pytest]

A new virtual environment gets the wheel with its extra `test`, and from the index the torch that
the wheel asks for. The wheel must refuse a torch of another release by an error that says what to
do. Then the tests of op, layers, contract and PEFT run in a folder that has no lora_ext, and with
nothing but the environment's programs on PATH, so no compiler.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["op", "layers", "contract", "peft"]
# What the tests of these folders read besides: benchmarks measures memory for some.
BESIDE = ["benchmarks", "docs", "scripts", "pyproject.toml"]
# What leads to a compiler, or to a lora_ext that is not the wheel's.
LEAKS = ("CC", "CXX", "CPATH", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD")

WHERE = "import lora_ext; print(lora_ext.__file__); print(lora_ext.build_info())"
OTHER_TORCH = """
__version__ = "2.999.0"
class version:
    cuda = None
"""


def check_files(wheel: Path) -> None:
    """One shared library, the extension: torch's own, grafted, would be a second copy of each."""
    if "-manylinux_" not in wheel.name:
        raise SystemExit(f"{wheel.name}: expected a manylinux tag; auditwheel repair gives it")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).name]
    if len(libraries) != 1 or not libraries[0].startswith("lora_ext/_C."):
        raise SystemExit(f"{wheel.name}: expected lora_ext/_C alone, but got {libraries}")


def clean_environment(bin_folder: Path) -> dict[str, str]:
    """Without a compiler, and without ways to other packages."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LEAKS and not name.startswith(("PYTHON", "PYTEST", "VIRTUAL", "MAKE"))
    }
    return {**kept, "PATH": str(bin_folder)}


def install(wheel: Path, venv: Path) -> Path:
    """Makes the virtual environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-compile",
    ]
    subprocess.run([*pip, f"{wheel.resolve()}[test]"], check=True)
    return python


def check_imported(python: Path, folder: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        [python, "-c", WHERE], cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, flush=True)
    if not Path(done.stdout.splitlines()[0]).is_relative_to(python.parent.parent):
        raise SystemExit("the tests would not import the wheel's lora_ext")


def check_other_torch(python: Path, folder: Path, env: dict[str, str]) -> None:
    """A module that calls itself torch of another release: the extension must not be loaded."""
    stub = folder / "other_torch"
    stub.mkdir()
    (stub / "torch.py").write_text(OTHER_TORCH)
    done = subprocess.run(
        [python, "-c", "import lora_ext"],
        cwd=folder,
        env={**env, "PYTHONPATH": str(stub)},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    print(f"Under another torch: {said[0]}", flush=True)
    if done.returncode == 0 or "but torch 2.999.0 is running" not in said[0]:
        raise SystemExit("expected an ImportError that names both releases of torch")


def run_tests(
    python: Path, folder: Path, env: dict[str, str], folders: list[str], arguments: list[str]
) -> int:
    def is_other(path: str, names: list[str]) -> set[str]:
        here = Path(path).relative_to(ROOT)
        others = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()} - {*folders}
        return {"__pycache__", *(others if here == Path("tests") else ())}

    shutil.copytree(ROOT / "tests", folder / "tests", ignore=is_other)
    for name in BESIDE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        "auto",
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rfs",
        *arguments,
    ]
    return subprocess.run([*command, "tests"], cwd=folder, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="as auditwheel repaired it")
    parser.add_argument(
        "--folders", nargs="+", default=FOLDERS, metavar="FOLDER", help=f"default: {FOLDERS}"
    )
    arguments, for_pytest = parser.parse_known_args()
    check_files(arguments.wheel)
    with tempfile.TemporaryDirectory(prefix="lora_ext_wheel_") as name:
        folder = Path(name).resolve()
        python = install(arguments.wheel, folder / "venv")
        env = clean_environment(python.parent)
        check_imported(python, folder, env)
        check_other_torch(python, folder, env)
        return run_tests(python, folder, env, arguments.folders, for_pytest)


if __name__ == "__main__":
    sys.exit(main())

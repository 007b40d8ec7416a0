"""The Makefile's targets, with a Python in the environment's place that prints how it is called."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rest import REST

ROOT = Path(__file__).resolve().parents[2]

SAYS = """#!/bin/sh
echo "cuda=$LORA_EXT_CUDA archs=$TORCH_CUDA_ARCH_LIST"
echo "arguments: $*"
"""


def called(*arguments) -> str:
    """What make prints."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs make with an environment that is built already; returns what it prints."""
    for variable in ("TORCH_CUDA_ARCH_LIST", "LORA_EXT_CUDA", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(variable, raising=False)
    venv = tmp_path / "venv"
    program(venv / "bin" / "python", SAYS)
    for stamp in (".torch", ".built-cpu", ".extras", ".kernel-oracles", ".cuda-headers"):
        (venv / stamp).touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    program(tmp_path / "tools" / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    def run(*arguments: str) -> str:
        return called("--silent", f"VENV={venv}", *arguments)

    run.smi = tmp_path / "tools" / "nvidia-smi"
    run.venv = venv
    return run


@pytest.mark.parametrize(
    ("card", "environment", "goals", "asked"),
    [
        ("", "", "build", "no-card"),
        ("", "", "bench test example-finetune", "no-card"),
        ("", "", "gpu DEVICE=cpu", "no-card"),
        ("", "auto", "build", "auto"),
        ("", "1", "test", "1"),
        ("", "", "wheel NVCC=nvcc", "1"),
        ("", "", "sass NVCC=nvcc", "1"),
        ("", "", "wheel NVCC=", "auto"),
        ("", "0", "gpu", "1"),
        ("8.6", "", "build", "auto"),
        ("8.6", "0", "build", "0"),
    ],
)
def test_cuda_is_compiled_for_a_card_or_on_request(
    make, monkeypatch, card, environment, goals, asked
):
    program(make.smi, f"#!/bin/sh\necho {card}\n")
    monkeypatch.setenv("LORA_EXT_CUDA", environment)
    said = make("--dry-run", "-W", "setup.py", *goals.split())
    assert re.findall("LORA_EXT_CUDA=(.*) PATH", said) == [asked]
    flavour = "cpu" if asked in ("0", "no-card") else "cuda"
    assert set(re.findall(r"touch .*/\.built-(.*)", said)) == {flavour}


def test_one_build_is_known_and_one_with_cuda_serves_where_there_is_no_card(make, monkeypatch):
    def built() -> list[str]:
        return [path.name for path in make.venv.glob(".built-*")]

    assert "install" not in make("build")
    monkeypatch.setenv("LORA_EXT_CUDA", "1")
    assert "cuda=1 " in make("build") and built() == [".built-cuda"]
    monkeypatch.delenv("LORA_EXT_CUDA")
    assert "install" not in make("build")
    assert "cuda=1 " in make("-W", "setup.py", "NVCC=nvcc", "build") and built() == [".built-cuda"]
    monkeypatch.setenv("LORA_EXT_CUDA", "0")
    assert "cuda=0 " in make("build") and built() == [".built-cpu"]


def test_gpu_builds_for_the_card_whatever_the_environment_says(make, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    monkeypatch.setenv("LORA_EXT_CUDA", "auto")
    program(make.smi, "#!/bin/sh\necho 9.0\n")
    assert "cuda=1 archs=9.0\n" in make("gpu")
    program(make.smi, "#!/bin/sh\necho 8.6\n")
    assert "cuda=1 archs=8.6\n" in make("gpu")
    assert "cuda=1 archs=8.0 9.0a\n" in make("gpu", "TORCH_CUDA_ARCH_LIST=8.0 9.0a")


def test_gpu_takes_the_default_list_where_nvidia_smi_says_nothing_of_use(make):
    program(make.smi, "#!/bin/sh\necho Failed to initialize NVML: Driver mismatch\n")
    assert "cuda=no-card archs=\n" in make("gpu", "DEVICE=cpu")
    assert "cuda=1 archs=\n" in make("gpu")


def test_gpu_counts_its_budget_from_the_start_of_make(make):
    before = int(time.time())
    said = make("gpu", "QUICK=1", "DEVICE=cpu", "ARGS=--only profile")
    started = re.search(r"-m benchmarks.gpu --started (\d+) --quick --device cpu", said)
    assert started and before <= int(started[1]) <= time.time()
    assert said.rstrip().endswith("--only profile")


def test_an_edited_source_is_compiled_before_what_needs_it(make, tmp_path):
    tree = tmp_path / "tree"
    compiled = ["csrc/op/ops.cpp", "csrc/kernels/gemm/sm90a/kernel.h", "setup.py", "pyproject.toml"]
    compiled.append("build_backend/lora_ext_backend.py")
    (tree / "tests").mkdir(parents=True)
    (tree / "emulator").mkdir()
    for name in ("Makefile", *compiled):
        program(tree / name, (ROOT / "Makefile").read_text())
    stamps = list((tmp_path / "venv").glob(".*"))
    for path in (*tree.rglob("*"), *stamps):
        os.utime(path, (10**9, 10**9))

    def compiles(target: str) -> bool:
        return "--editable ." in make("--dry-run", f"--directory={tree}", target)

    assert not compiles("test")
    for name in compiled:
        os.utime(tree / name)
        assert compiles("test"), name
        os.utime(tree / name, (10**9, 10**9))
    os.utime(tree / compiled[0])
    assert all(map(compiles, ("build", "bench", "example-finetune", "gpu")))


def test_each_layer_selects_its_marker_and_a_path_is_run_whole(make):
    daily = "not nightly and not kernels"
    assert f"-n auto --dist worksteal -m not rest and {daily} -k few" in make("test", "ARGS=-k few")
    assert f"-n auto --dist loadfile -m rest and {daily} -k few" in make("test-rest", "ARGS=-k few")
    said = make("test", "ARGS=tests/bench -k few")
    assert "--dist worksteal tests/bench -k few" in said and "-m not" not in said


def test_what_is_left_to_the_rest_is_there():
    assert [name for name in REST if not (ROOT / "tests" / name).exists()] == []


# Debian's python3 without python3-venv: it makes environments, but cannot put pip into them.
WITHOUT_ENSUREPIP = f"""#!/bin/sh
case "$*" in
  "-m venv --without-pip "*) ;;
  "-m venv "*) echo "ensurepip is not available" >&2; exit 1 ;;
esac
exec {sys.executable} "$@"
"""


def test_a_python_without_ensurepip_lends_its_pip_with_torch(tmp_path):
    python = program(tmp_path / "bin" / "python3", WITHOUT_ENSUREPIP)
    venv = tmp_path / "new"
    called("--silent", f"VENV={venv}", f"PYTHON={python}", str(venv / ".torch"))
    code = "import pip, setuptools, sys, torch; print(sys.prefix)"
    found = subprocess.check_output([venv / "bin" / "python", "-c", code], text=True)
    assert found.strip() == str(venv)


def test_tools_of_lent_packages_are_those_of_the_python_that_lends(tmp_path):
    lender, venv = tmp_path / "lender", tmp_path / "venv"
    python = program(lender / "python3", "#!/bin/sh\n")
    program(venv / "bin" / "python", "#!/bin/sh\n")  # whose pip has nothing to install
    for folder, name, says in (
        (lender, "ruff", "lent"),
        (lender, "vermin", "lent"),
        (venv / "bin", "vermin", "own"),
    ):
        program(folder / name, f"#!/bin/sh\necho {says}\n")
    for stamp in (".torch", ".built-cpu"):
        (venv / stamp).touch()
    called("--silent", f"VENV={venv}", f"PYTHON={python}", str(venv / ".tools"))
    said = [subprocess.check_output([venv / "bin" / name]) for name in ("ruff", "vermin")]
    assert said == [b"lent\n", b"own\n"]
    assert not os.path.lexists(venv / "bin" / "pyright")


def targets() -> list[str]:
    """Those that CONTRIBUTING.md names, and those that the Makefile calls phony."""
    named = re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text())
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(named) > 10
    return sorted({*named, *" ".join(phony).split()})


def test_help_has_every_target_and_first_those_for_everybody(make):
    parts = make("help").split("for builders:\n")
    first, others = (re.findall(r"^  make (\S+) +\w", part, re.MULTILINE) for part in parts)
    assert " ".join(first) == "build lint format test test-gpu bench docs wheel clean"
    listed = {name.replace("-%", "-finetune") for name in (*first, *others)}
    assert listed == {*targets(), "example-finetune"} - {"help"}


def absent(recipe: str) -> list[str]:
    """Programs of the repository, and modules of Python, that a recipe calls but that are not."""
    folders = "scripts|tests|emulator|benchmarks|csrc|lora_ext|build_backend"
    own = rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.py)\b"
    missing = [path for path in re.findall(own, recipe) if not (ROOT / path).exists()]
    modules = set(re.findall(r"python -m ([\w.]+)", recipe)) - {"venv", "pip", "mkdocs"}
    return missing + [name for name in sorted(modules) if importlib.util.find_spec(name) is None]


def test_what_a_recipe_calls_is_looked_for():
    recipe = "venv/bin/python scripts/no_such.py && venv/bin/python -m benchmarks.no_such -q"
    assert absent(recipe) == ["scripts/no_such.py", "benchmarks.no_such"]
    assert absent("venv/bin/python -m benchmarks.gpu; venv/bin/python scripts/sass.py") == []


@pytest.mark.parametrize("target", targets())
def test_what_a_target_calls_is_there(tmp_path, target):
    """From nothing: every rule that the target needs is printed."""
    recipes = called("--dry-run", f"VENV={tmp_path / 'venv'}", target)
    assert recipes.strip() and absent(recipes) == []

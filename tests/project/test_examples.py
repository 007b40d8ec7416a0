"""The examples run, and print what examples/README.md shows but for numbers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = dict(
    re.findall(
        r"^## (\w+)\n.*?```text\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.M | re.S
    )
)


def kept(text):
    """Words alone: numbers, spaces of tables, kernels and their products are those of a machine."""
    of_kernels = (
        r"(?:amx|avx512_bf16|avx512|avx2|portable) kernels(?: in one pass, products in \w+)?"
    )
    return re.sub(rf"{of_kernels}|[-\d.]+|\s+", " ", text).split()


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_prints_what_is_shown(name):
    code = (EXAMPLES / f"{name}.py").read_text()
    assert len(code.splitlines()) <= 60
    begin = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); __file__ = {__file__!r}\n"
    # All output of the same steps, of which there are fewer here.
    short = code.replace("STEPS = 8, 64, 60", "STEPS = 4, 16, 60")
    command = [sys.executable, "-W", "ignore", "-c", begin + short]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kept(done.stdout) == kept(SHOWN[name])
    losses = [float(found) for found in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert not losses or losses[-1] < losses[0]


def test_every_example_is_shown():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHOWN, "server"}

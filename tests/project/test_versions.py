"""The table of supported versions: who quotes it, and what is said of older ones."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ext import torch_state, versions
from lora_ext.quantized import of_bitsandbytes, of_gguf, of_torchao
from lora_ext.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
OLDEST = {package: oldest for package, (oldest, _) in SUPPORTED.items()}


def test_pyproject_asks_for_the_oldest_wherever_it_names_a_package():
    text = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r'"(\w+)((?:>=[\d.]+)?)"(?!, match-runtime)', text)
    found = {(package, bound) for package, bound in asked if package in OLDEST}
    assert found == {(package, f">={oldest}") for package, oldest in OLDEST.items()}


@pytest.mark.parametrize(
    ("file", "form"),
    [
        ("Makefile", r">= \((\d+, \d+)\)"),
        ("Makefile", r"OLDEST_TORCH := ([\d.]+)"),
        ("setup.py", r"torch>=([\d.]+)"),
        ("build_backend/lora_ext_backend.py", r"torch>=([\d.]+)"),
        ("build_backend/lora_ext_backend.py", r"MINIMUM_TORCH = \((.*)\)"),
        ("docs/build.md", r"torch ([\d.]+) or newer"),
        ("docs/peft.md", r"PEFT ([\d.]+) or newer"),
    ],
)
def test_the_build_and_its_pages_quote_the_table(file, form):
    package = "peft" if "PEFT" in form else "torch"
    found = {each.replace(", ", ".") for each in re.findall(form, (ROOT / file).read_text())}
    assert found == {OLDEST[package]}


def test_the_page_on_compatibility_has_the_table():
    text = (ROOT / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    assert {package: (oldest, newest) for package, oldest, newest in rows} == SUPPORTED


@pytest.mark.parametrize("package", SUPPORTED)
def test_an_older_version_is_named_with_what_to_install(package):
    oldest = OLDEST[package]
    major, minor = map(int, oldest.split("."))
    older = f"{major}.{minor - 1}.9" if minor else f"{major - 1}.57.1"
    said = (
        f"expected {package} {oldest} or newer, but got {older}; pip install '{package}>={oldest}'"
    )
    assert versions.refusal(package, older) == said
    for version in (oldest, f"{oldest}.0rc1", f"{major}.{minor + 10}.1+cpu", f"{major + 1}.0", "x"):
        assert versions.refusal(package, version) == ""
    assert versions._refusal_here("torch") == "" == versions._refusal_here("no_such_package")


def test_names_of_torch_that_are_not_public_are_looked_up_in_one_file():
    """They come and go with releases: `torch_state` refuses a torch that lacks one."""
    private = r"\b(?:torch|forward_ad)(?!\.ops)[\w.]*(?:\.| import )_[a-z]\w*"
    for path in sorted((ROOT / "lora_ext").rglob("*.py")):
        found = re.findall(private, re.sub("#.*", "", path.read_text()))
        assert found == [] or path.name == "torch_state.py", f"{path.name}: {found}"
    with pytest.raises(ImportError, match=r"torch\.utils\._gone\.name.*install one that"):
        torch_state._private("torch.utils._gone.name")
    with pytest.raises(ImportError, match=r"expected a torch that has torch\._C\._gone"):
        torch_state._private("torch._C._gone")


class Stack(torch.Tensor):
    """Of three dimensions, or a matrix: as torchao's classes, whose module is told by name."""

    __module__ = "torchao.quantization"


@pytest.mark.parametrize(
    ("package", "ask"),
    [
        ("bitsandbytes", lambda: of_bitsandbytes.four_bit_base(None, None)),
        ("bitsandbytes", lambda: of_bitsandbytes.eight_bit_base(None, None)),
        ("bitsandbytes", lambda: of_bitsandbytes.four_bit_stack(None, None)),
        (
            "torchao",
            lambda: of_torchao.torchao_stack(
                nn.Module(), "", torch.zeros(2, 4, 4).as_subclass(Stack)
            ),
        ),
        ("torchao", lambda: of_torchao.torchao_base(matrix(), None)),
        ("diffusers", lambda: of_gguf.diffusers_gguf_base(None, None)),
    ],
)
def test_no_layer_of_an_older_library_is_read(package, ask, monkeypatch):
    """Attributes may be missing, or mean something else: its own forward is called instead."""
    monkeypatch.setitem(versions.TOO_OLD, package, "too old")
    assert ask() == "too old"


def matrix() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Stack), requires_grad=False)
    return layer

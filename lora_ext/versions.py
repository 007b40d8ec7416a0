"""Which versions of other packages lora_ext works with, and what is said of an older one.

They are named here alone: a test compares pyproject.toml, the build and the documentation with it.
"""

from __future__ import annotations

import importlib.metadata
import re

# Package -> its oldest release that works, and the newest that all tests have run with.
SUPPORTED = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.0", "5.25"),
    "peft": ("0.19", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "torchao": ("0.18", "0.18"),
    "diffusers": ("0.36", "0.42"),
}


def refusal(package: str, version: str) -> str:
    """What was expected, what came and what to do, for a version that is too old; else ""."""
    oldest = SUPPORTED[package][0]
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) >= tuple(map(int, oldest.split("."))):
        return ""
    return (
        f"expected {package} {oldest} or newer, but got {version}; "
        f"pip install '{package}>={oldest}'"
    )


def _refusal_here(package: str) -> str:
    try:
        return refusal(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return ""


# The same for what is installed, read once: compiled code looks at it.
TOO_OLD = {package: _refusal_here(package) for package in SUPPORTED}

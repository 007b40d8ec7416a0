"""PEP 517 backend: setuptools, plus the choice of the torch to compile against.

A C++ extension works only with the torch release that it was compiled for, but an isolated build
gets the newest torch, whatever the environment that will run it holds. So this backend looks for
torch in that environment and compiles against that one. Where there is none yet, it asks pip which
release pip is going to install there, and has the build use the same.
"""

import glob
import json
import os
import shutil
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

MINIMUM_TORCH = (2, 11)
ANY_TORCH = "torch>=2.11"

LOOK_FOR_TORCH = """
import importlib.metadata, json, sys
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = ""
print(json.dumps([version, [path for path in sys.path if path]]))
"""

ASK_PIP = ["-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]


def run_in_target(arguments: list[str]) -> str:
    """Runs the interpreter of the environment being installed into; returns what it printed.

    It is this interpreter: what sets a build apart from it is PYTHONPATH, and -E ignores that.
    """
    done = subprocess.run(
        [sys.executable, "-E", *arguments],
        cwd=sys.prefix,  # not the source tree, which -c and -m would put on the import path
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def target_path() -> list[str]:
    """The target's import path, or [] if the target holds no torch that is recent enough."""
    version, path = json.loads(run_in_target(["-c", LOOK_FOR_TORCH]))
    recent = version and tuple(map(int, version.split(".")[:2])) >= MINIMUM_TORCH
    return path if recent else []


def torch_to_come() -> str:
    """The requirement for the torch that pip will install beside lora_ext; any, without pip."""
    try:
        report = json.loads(run_in_target([*ASK_PIP, "--report", "-", ANY_TORCH]))
        return f"torch=={report['install'][0]['metadata']['version']}"
    except (subprocess.CalledProcessError, ValueError, LookupError):
        return ANY_TORCH


def build_requirements() -> list[str]:
    ninja = [] if shutil.which("ninja") else ["ninja"]
    return ninja if target_path() else [*ninja, torch_to_come()]


def use_target_torch() -> None:
    """Makes the target's torch importable here, behind all that the build environment holds."""
    sys.path.extend(path for path in target_path() if path not in sys.path)


def get_requires_for_build_wheel(config_settings=None):
    return build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_requirements()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    use_target_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    use_target_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    use_target_torch()
    for stale in glob.glob(os.path.join("build", "lib*")):  # setuptools would ship all it finds
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    use_target_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)

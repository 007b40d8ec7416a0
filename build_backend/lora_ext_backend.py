"""PEP 517 backend: setuptools, plus the choice of the torch to compile against.

A C++ extension works only with the torch release that it was compiled for, but an isolated build
gets the newest torch, whatever the environment that will run it holds. So this backend asks the
target's pip which torch the target is going to hold. If that is the one there now, the extension is
compiled against it, in place; if pip is about to install one, the build requires the same release.
"""

import glob
import importlib.util
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
TORCH = "torch>=2.11"

ASK_PIP = ["-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", TORCH]

LOOK_FOR_TORCH = """
import importlib.metadata, json, sys
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = ""
print(json.dumps([version, [path for path in sys.path if path]]))
"""


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


def torch_requirements() -> list[str]:
    """What the build must install to have the torch that the target is going to hold."""
    try:
        coming = json.loads(run_in_target(ASK_PIP))["install"]
    except (subprocess.CalledProcessError, ValueError, LookupError):  # no pip, or one before 22.2
        return [] if target_path() else [TORCH]
    return [f"torch=={package['metadata']['version']}" for package in coming]


def build_requirements() -> list[str]:
    return torch_requirements() + ([] if shutil.which("ninja") else ["ninja"])


def use_target_torch() -> None:
    """Makes the target's torch importable here, unless the build has a torch of its own."""
    if importlib.util.find_spec("torch") is None:
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

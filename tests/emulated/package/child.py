"""Runs code in the package of build.py, behind what calls.py has."""

from emulated.package import build


def python(code: str, arch: str = "80", **environment: str) -> str:
    """What it prints; it must end without an error."""
    command = ["-c", f"from emulated.package.calls import *\n{code}"]
    done = build.run(command, PYTHONPATH="tests", LORA_EXT_EMULATED_ARCH=arch, **environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr

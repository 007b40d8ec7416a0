"""How this copy of lora_ext was built and what it runs on; `python -m lora_ext` prints it."""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

_FACTS_FILE = Path(__file__).with_name("_build.json")  # written by setup.py
_REINSTALL = "run `pip install .` in the source tree"
# uv reads the requirements for torch in our pyproject.toml only if it is run in this project;
# otherwise it builds with the newest torch, even if the target environment has another.
_REINSTALL_BY_UV = "run `uv pip install .` inside the source tree, or with --no-build-isolation,"


class BuildInfo(dict[str, Any]):
    """A dict whose str() is a table, one `key  value` line an entry."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:<{width}}  {_readable(value)}" for key, value in self.items())


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "-" if value in (None, "") else str(value)


def _build_facts() -> tuple[dict[str, Any], str]:
    """The facts that the build wrote, and "" or, if they cannot be read, what is wrong."""
    try:
        facts = json.loads(_FACTS_FILE.read_text())
    except FileNotFoundError:
        return {}, _hidden_copy() or (
            f"{_FACTS_FILE.name} is missing, so the extension was not built: {_REINSTALL}"
        )
    except (OSError, ValueError) as error:
        return {}, f"{_FACTS_FILE.name} cannot be read ({error}): {_REINSTALL}"
    if not isinstance(facts, dict):
        return {}, f"{_FACTS_FILE.name} holds no table of facts: {_REINSTALL}"
    return facts, ""


def _hidden_copy() -> str:
    """What to do if the source tree hides an installed copy, else ""."""
    here = _FACTS_FILE.parent.resolve()
    for entry in sys.path:
        other = Path(entry or ".", here.name).resolve()
        if other != here and (other / _FACTS_FILE.name).is_file():
            return (
                f"{here} is the source tree, and hides the installed copy, {other}: start Python "
                "in another folder"
            )
    return ""


def _running_torch() -> tuple[str, str | None]:
    """The version of the torch that is imported, and the CUDA version that it was built for."""
    try:
        torch = importlib.import_module("torch")
        return str(torch.__version__), torch.version.cuda
    except Exception as error:  # a broken torch can raise anything
        return f"not importable: {error}", None


def _release(torch_version: str) -> list[str]:
    """The part of the version that an extension depends on: "2.13.0+cpu" -> ["2", "13"]."""
    return torch_version.split("+")[0].split(".")[:2]


def version() -> str:
    """Returns the version of lora_ext, as pyproject.toml gave it to the installed package."""
    try:
        return importlib.metadata.version("lora_ext")
    except importlib.metadata.PackageNotFoundError:
        return str(_build_facts()[0].get("version", "unknown: lora_ext is not installed"))


@functools.cache
def build_id() -> str:
    """An identifier of the compiled extension: the same for equal files, different for others."""
    extension = importlib.import_module("lora_ext._C")
    return hashlib.blake2b(Path(str(extension.__file__)).read_bytes(), digest_size=6).hexdigest()


def torch_mismatch() -> str:
    """Returns "" if torch is of the release that the extension was built with, else what to do.

    Under another release the extension fails to import or, worse, imports and misreads memory.
    """
    facts, missing = _build_facts()
    running = _running_torch()[0]
    built = str(facts.get("torch"))
    if missing or _release(built) == _release(running):
        return ""
    found = f"lora_ext was built with torch {built}, but torch {running} is running"
    ours, other = ".".join(_release(built)), ".".join(_release(running))
    if f"+torch{ours}" in str(facts.get("version")):  # a wheel that `make wheel` made
        return f"{found}: install torch=={ours}.*, or a wheel of lora_ext named +torch{other}"
    cure = _REINSTALL_BY_UV if _installer() == "uv" else _REINSTALL
    return f"{found}: {cure} to build it for this one"


def _installer() -> str:
    """The program that installed this copy, from its INSTALLER file (PEP 627); "" if unknown."""
    try:
        return (importlib.metadata.distribution("lora_ext").read_text("INSTALLER") or "").strip()
    except importlib.metadata.PackageNotFoundError:
        return ""


def import_error_hint() -> str:
    """Returns a sentence for a failed import of lora_ext._C: what is wrong and what to run."""
    reason = _build_facts()[1] or torch_mismatch()
    reason = reason or f"it is damaged, or was built for another Python: {_REINSTALL}"
    return f"lora_ext._C, the compiled part of lora_ext, cannot be imported: {reason}"


def build_info() -> BuildInfo:
    """Returns how this copy was built and what it runs on, for print() and bug reports.

    Never raises: an entry that cannot be known is a string that says why.

    Returns:
        A dict with these keys:

        version             version of lora_ext
        extension           "loaded", or why lora_ext._C cannot be imported
        torch_built         the torch that compiled the extension, such as "2.13.0+cpu"
        torch_running       the torch that is imported
        torch_cuda          CUDA version of the torch that is imported, None for a CPU build
        compiler            first line of the C++ compiler's --version
        openmp              bool: CPU kernels use torch's OpenMP threads; False: one thread
        cuda                bool: CUDA kernels are compiled in
        cuda_version        version of the nvcc that compiled them, None without
        cuda_archs          list of their GPU architectures, such as ["8.0+PTX", "9.0a"]
        cuda_reason         "", or why they are not compiled in and what to do about it
        cuda_driver         the newest CUDA that the driver here takes, such as "13.0", and what to
                            do if the kernels need a newer one; "none" without a driver; None
                            without kernels
        cpu_isa             CPU kernel set in use: "amx", "avx512_bf16", "avx512", "avx2" or
                            "portable"
        cpu_isas_available  list of the kernel sets that this processor runs
        cpu_panels          list of dtypes of x whose layers are computed in one pass here, each
                            with the dtype in which it multiplies, such as "bfloat16:float32"
    """
    facts, missing = _build_facts()
    unknown = f"unknown: {missing}"
    running, torch_cuda = _running_torch()
    info = BuildInfo(
        version=version(),
        extension="loaded",
        torch_built=facts.get("torch", unknown),
        torch_running=running,
        torch_cuda=torch_cuda,
        compiler=facts.get("compiler", unknown),
        openmp=facts.get("openmp", unknown),
        cuda=facts.get("cuda", False),
        cuda_version=facts.get("cuda_version"),
        cuda_archs=facts.get("cuda_archs", []),
        cuda_reason=facts.get("cuda_reason", unknown),
        cuda_driver=None,
    )
    try:
        extension = importlib.import_module("lora_ext._C")
        info["cuda"] = bool(extension.with_cuda)
        if extension.with_cuda:
            info["cuda_driver"] = extension.cuda_driver()
        info["cpu_isa"] = extension.cpu_isa()
        info["cpu_isas_available"] = list(extension.available_cpu_isas())
        info["cpu_panels"] = _panels(extension)
    except Exception as error:  # ImportError, or whatever its first call raises
        info["extension"] = f"not loaded: {torch_mismatch() or missing or error}"
        info["cpu_isa"] = "unknown: the extension is not loaded"
        info["cpu_isas_available"], info["cpu_panels"] = [], []
    return info


def _panels(extension: Any) -> list[str]:
    torch = importlib.import_module("torch")  # it is there, or the extension would not be
    found = {x: extension.cpu_panels(x) for x in (torch.float32, torch.bfloat16, torch.float16)}
    return [f"{str(x)[6:]}:{str(panels)[6:]}" for x, panels in found.items() if panels]


if __name__ == "__main__":
    print(build_info())

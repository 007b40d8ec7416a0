"""Compiles the clustered GEMM with edits: copies of its sources shadow the originals."""

import itertools
import re
from pathlib import Path

from emulator import build, cuda_headers, device_build
from emulator.device_build import SPECIMENS_SM90A as SM90A
from emulator.hostile.faults import SOURCES, Fault

PROGRAM = "specimens/gemm_wgmma.cpp"
KERNELS = "specimens/gemm_wgmma_kernels.cpp"
HOST_READS = ("gemm_wgmma.cpp", "gemm_wgmma_plan.h")  # an edit of these concerns the host, too


def originals() -> dict[str, str]:
    return {name: (build.EMULATOR / "specimens" / name).read_text() for name in SOURCES}


def apply_edits(fault: Fault, texts: dict[str, str]) -> dict[str, str]:
    """The sources that the fault changes, by name. Its edits are all of the original text."""
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for old, new in fault.edits:
        found = {name: text.count(old) for name, text in texts.items() if old in text}
        if sum(found.values()) != 1:
            raise ValueError(
                f"{fault.name}: expected to find once, but found in {found or 'no source'}:\n{old}"
            )
        [name] = found
        start = texts[name].index(old)
        spans.setdefault(name, []).append((start, start + len(old), new))
    changed = {}
    for name, edits in spans.items():
        edits.sort()
        if any(before[1] > after[0] for before, after in itertools.pairwise(edits)):
            raise ValueError(f"{fault.name}: its edits of {name} overlap")
        text = texts[name]
        for start, end, new in reversed(edits):
            text = text[:start] + new + text[end:]
        changed[name] = text
    return changed


def write_sources(fault: Fault, include: Path) -> dict[str, str]:
    """Writes all sources, edited, below `include`; returns the changed ones."""
    texts = originals()
    changed = apply_edits(fault, texts)
    folder = include / "emulator" / "specimens"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**texts, **changed}.items():
        (folder / name).write_text(text)
    # No fault sites: the kernels are as on the device, and compile in half the time.
    fault_h = (build.EMULATOR / "fault.h").read_text()
    without_sites, count = re.subn(
        r"^struct PlantedFault \{.*?^\};",
        "struct PlantedFault : NoFault {};",
        fault_h,
        flags=re.S | re.M,
    )
    if count != 1:
        raise ValueError("fault.h: expected one definition of struct PlantedFault")
    (include / "emulator" / "fault.h").write_text(without_sites)
    return changed


def compile_edited(flavour: str, source: str, kernels: bool, include: Path, folder: Path) -> Path:
    original = build.Object(flavour, source, kernels)
    command = original.command()
    target = folder / original.path.name
    shadow = include / "emulator" / source
    edited = str(shadow if shadow.exists() else build.EMULATOR / source)
    rewritten = {str(original.path): str(target), str(build.EMULATOR / source): edited}
    words = [rewritten.get(word, word) for word in command]
    build.run_tool([words[0], f"-I{include}", *words[1:]])
    return target


def build_edited(fault: Fault, flavour: str) -> str:
    """Builds the specimen with a fault's edits and returns its name for run_specimen."""
    folder = build.BUILD / "hostile" / fault.name
    changed = write_sources(fault, folder / "include")
    folder = folder / flavour
    folder.mkdir(parents=True, exist_ok=True)
    edited = {KERNELS: compile_edited(flavour, KERNELS, True, folder.parent / "include", folder)}
    if set(changed) & set(HOST_READS):
        edited[PROGRAM] = compile_edited(flavour, PROGRAM, False, folder.parent / "include", folder)
    inputs = [edited.get(item.source, item.path) for item in build.objects_of(flavour, PROGRAM)]
    name = f"hostile/{fault.name}/{flavour}/gemm_wgmma"
    flags = ["-pie", *build.FLAVOURS[flavour].link_flags]
    executable = build.BUILD / name
    build.run_tool([build.CXX, *flags, *map(str, inputs), "-o", str(executable), "-pthread"])
    return name


def device_objections(fault: Fault) -> str:
    """What the device build of the edited sources is refused for; "" without nvcc."""
    if cuda_headers.nvcc() is None:
        return ""
    folder = build.BUILD / "hostile" / fault.name
    try:
        report = device_build.compile_kernels(SM90A, folder / "cubin", folder / "include")
    except RuntimeError as refused:
        return re.search(r"error: [^(\n]*", str(refused))[0].strip()
    return "; ".join(dict.fromkeys(device_build.objections(SM90A, report)))

"""setup.py and a CUDA toolkit: architectures, options of each file, what cannot be used."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[2]


def test_arch_flags(setup_py):
    assert setup_py["arch_flags"](["8.0+PTX", "9.0a+PTX", "12.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(CompileError, match=r"expected entries like .* but got 'Hopper'"):
        setup_py["arch_flags"](["Hopper"])


@pytest.mark.parametrize(
    ("asked", "archs", "has_wgmma"),
    [
        ("", ["8.0+PTX", "9.0a"], True),
        ("8.6 9.0a; 10.0+PTX", ["8.6", "9.0a", "10.0+PTX"], True),
        ("8.0 9.0a+PTX", ["8.0", "9.0a+PTX"], True),
        ("8.0;9.0", ["8.0", "9.0a"], True),
        ("9.0+PTX", ["9.0a+PTX"], True),
        ("9.0 9.0a 9.0", ["9.0a"], True),
        ("9.0 9.0a+PTX", ["9.0a+PTX"], True),
        ("8.0 12.0", ["8.0", "12.0"], False),
    ],
)
def test_arch_list_is_honoured(setup_py, monkeypatch, asked, archs, has_wgmma):
    """Kernels on wgmma are empty for others than 9.0a, and lora_wgrad would wait for them; 9.0,
    as containers preset it, is taken as 9.0a.
    """
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    toolkit = setup_py["CudaToolkit"]()
    assert toolkit.archs == archs
    assert ("-DLORA_EXT_WITH_SM90A" in toolkit.flags) == has_wgmma


@pytest.mark.parametrize("choice", ["auto", "0", "no-card", "1", "yes"])
def test_cuda_choice_without_a_toolkit(build_ext, monkeypatch, tmp_path, choice):
    command, extension = build_ext
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_EXT_CUDA", choice)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    if choice in ("1", "yes"):
        with pytest.raises(CompileError, match=r"No nvcc was found|expected auto, 0 or 1"):
            command.add_cuda(extension, *command.choose_cuda())
        return
    facts = command.add_cuda(extension, *command.choose_cuda())
    assert facts["cuda"] is False
    said = {"auto": "No nvcc was found", "0": "LORA_EXT_CUDA=0", "no-card": "there is no card"}
    assert said[choice] in facts["cuda_reason"]
    assert extension.sources == ["csrc/kernels/launch/none.cpp"]
    assert extension.extra_objects == []


@pytest.mark.parametrize(
    ("cuda", "choice", "is_compiled"),
    [(None, "", False), (None, "auto", False), (None, "1", True), ("13.0", "auto", True)],
)
def test_a_torch_that_never_runs_cuda_gets_no_kernels_but_on_request(
    toolkit, monkeypatch, cuda, choice, is_compiled
):
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setenv("LORA_EXT_CUDA", choice)
    facts, compiled = toolkit()
    assert facts["cuda"] == is_compiled == bool(compiled)
    if not is_compiled:
        assert "has no CUDA" in facts["cuda_reason"] and "LORA_EXT_CUDA=1" in facts["cuda_reason"]


# Knows what a real one is asked: its version, folders and architectures, and to write an object.
NVCC = """#!{python}
import pathlib, re, sys
said = " ".join(sys.argv[1:])
with open({log!r}, "a") as log:
    print(said, file=log)
known = {archs!r}
if "--version" in said:
    print("Cuda compilation tools, release {release}, V{release}.88")
elif "--list-gpu-arch" in said:
    print(*(f"compute_{{arch}}" for arch in known), sep="\\n")
elif "--dryrun" in said:
    print('#$ INCLUDES="-I/toolkit/include"', '#$ LIBRARIES="-L/toolkit/lib"', sep="\\n")
else:
    for arch in re.findall(r"arch=compute_([0-9]+)", said):
        if int(arch) not in known:
            sys.exit(f"nvcc fatal: error: Unsupported gpu architecture 'compute_{{arch}}'")
    target = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    target.write_text("")
    if target.suffix == ".o":
        print("ptxas info    : (C7510) Potential Performance Loss: serialized")
        print("ptxas info    : 0 bytes gmem", "    0 bytes stack frame", sep="\\n")
        target.with_suffix(".d").write_text(f"{{target}} : \\\\\\n {header} \\\\\\n")
"""


@pytest.fixture
def toolkit(build_ext, monkeypatch, tmp_path):
    """install(release, archs): a toolkit; returns add_cuda()'s facts and each file's options."""
    command, extension = build_ext

    def install(release="13.0", archs=(75, 80, 90, 100)):
        log = tmp_path / "log"
        log.touch()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        words = {"python": sys.executable, "log": str(log), "archs": archs, "release": release}
        words["header"] = tmp_path / "header.h"
        words["header"].touch()
        nvcc.write_text(NVCC.format(**words))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        if "LORA_EXT_CUDA" not in os.environ:
            monkeypatch.setattr("torch.version.cuda", "13.0")
        command.build_temp = str(tmp_path / "objects")
        facts = command.add_cuda(extension, *command.choose_cuda())
        compiled = re.findall(r"(.*) -c (csrc/kernels/launch/\S+)", log.read_text())
        return facts, {Path(source).name: options for options, source in compiled}

    return install


def codes_of(options: str) -> list[str]:
    return re.findall(r",code=(\w+)", options)


def test_an_nvcc_that_cannot_compile_is_no_toolkit(toolkit):
    facts, compiled = toolkit(archs=())
    assert "Unsupported gpu architecture 'compute_80'" in facts["cuda_reason"]
    assert facts["cuda_reason"].endswith("then reinstall.")
    assert facts["cuda"] is False and not compiled


def test_a_cuda_file_is_compiled_again_only_if_what_makes_it_changed(
    toolkit, tmp_path, build_ext, setup_py, monkeypatch
):
    names = setup_py["CudaToolkit"].__init__.__globals__
    files = ["csrc/kernels/launch/dropout.cu", "csrc/kernels/launch/lora_linear.cu"]
    monkeypatch.setitem(names, "sources", lambda pattern: files)
    toolkit()
    command, extension = build_ext
    log = tmp_path / "log"

    def compiled_again() -> int:
        log.write_text("")
        command.add_cuda(extension, *command.choose_cuda())
        return log.read_text().count(" -c csrc/kernels/launch/")

    assert compiled_again() == 0
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert [compiled_again(), compiled_again()] == [2, 0]
    monkeypatch.setitem(names, "NVCC_FLAGS", ["-O2"])
    assert compiled_again() == 2
    os.utime(tmp_path / "header.h", (2**32, 2**32))
    assert compiled_again() == 2


def test_of_ptxas_report_the_build_shows_that_products_wait_for_each_other(toolkit, capsys):
    _, compiled = toolkit()
    said = capsys.readouterr().out
    assert said.count("(C7510)") >= len(compiled) > 0
    assert "gmem" not in said and "stack frame" not in said


def test_instances_are_compiled_once_for_each_part_and_type(toolkit, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    toolkit()
    macros = r"-DLORA_EXT_PART=(\w+) -DLORA_EXT_TYPE=(\w+) .* -c (\S+) -o (\S+)"
    commands = re.findall(macros, (tmp_path / "log").read_text())
    folder = Path("csrc/kernels/launch")
    declared = re.findall(r"#define (\w+)\(kind, T\)", (ROOT / folder / "instances.h").read_text())
    parts = [name for name in declared if name != "LORA_EXT_ALL"]
    wanted = [(part, type) for part in parts for type in ("__nv_bfloat16", "__half")]
    assert sorted(command[:2] for command in commands) == sorted(wanted)
    assert {source for _, _, source, _ in commands} == {str(folder / "instances.cu")}
    objects = {Path(target).name.removesuffix(".cu.o") for *_, target in commands}
    sass = runpy.run_path(str(ROOT / "scripts" / "sass.py"))
    assert len(objects) == len(wanted)
    assert objects == set(sass["SOURCES_OF"]["sm_90a"]) - {"dequantize", "experts"}


@pytest.mark.parametrize("release", ["11.8", "12.0", "12.5", "12.6", "13.1", "14.0"])
def test_an_older_nvcc_builds_for_the_cpu_and_says_why(toolkit, release):
    facts, compiled = toolkit(release)
    kernels = {path.name for path in Path(ROOT, "csrc/kernels/launch").glob("*.cu")}
    if facts["cuda"] is False:
        assert release < "12.6" and not compiled
        assert f"nvcc {release} is older than 12.6" in facts["cuda_reason"]
        assert facts["cuda_reason"].endswith("then reinstall.")
    else:
        assert release >= "12.6" and facts["cuda_version"] == release and set(compiled) == kernels


@pytest.mark.parametrize(
    ("archs", "nvcc", "dropout", "kernels"),
    [
        ("", (75, 80, 90), ["sm_75"], ["sm_80", "compute_80", "sm_90a"]),
        ("", (50, 70, 75, 80, 90), ["sm_70"], ["sm_80", "compute_80", "sm_90a"]),
        ("7.5", (75, 80), ["sm_75"], ["sm_80"]),
        ("6.0;7.5+PTX 8.6", (60, 70, 75, 80, 86), ["sm_70", "sm_60", "sm_75"], ["sm_86"]),
        ("5.2;8.0", (75, 80), ["sm_75"], ["sm_80"]),
    ],
)
def test_cards_below_8_0_get_dropout_and_never_fail_the_build(
    toolkit, monkeypatch, capsys, archs, nvcc, dropout, kernels
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    facts, compiled = toolkit(archs=nvcc)
    assert facts["cuda"] is True
    old = [word for word in re.split("[; ]", archs) if word[:1] in ("5", "6", "7")]
    assert not set(old) & set(facts["cuda_archs"])
    said = capsys.readouterr().out
    assert (f"for {' '.join(old)} dropout alone is compiled" in said) == bool(old)
    for name, options in compiled.items():
        codes = codes_of(options)
        if name == "dropout.cu":
            assert [code for code in codes if code not in ("compute_75", *kernels)] == dropout
            assert set(kernels) <= set(codes)
        else:
            assert codes == kernels, name


@pytest.mark.parametrize(
    ("cards", "nvcc", "added", "said"),
    [
        ([(12, 0)], (75, 80, 90, 100, 120), ["12.0"], "12.0 is added for the card here, of 12.0"),
        ([(10, 3)], (75, 80, 90, 100, 120), ["10.0"], "10.0 is added for the card here, of 10.3"),
        ([(12, 0)] * 2 + [(10, 0)], (75, 80, 90, 100, 120), ["10.0", "12.0"], "12.0 is added"),
        ([(12, 0)], (75, 80, 90), [], "nvcc 13.0 has no code for the card here, of 12.0"),
        ([(8, 0), (8, 6), (8, 9), (9, 0)], (75, 80, 86, 89, 90), [], ""),
        ([(7, 5)], (75, 80, 90), [], ""),
        ([RuntimeError("CUDA driver initialization failed")], (75, 80, 90), [], ""),
        ([], (75, 80, 90), [], ""),
    ],
)
def test_the_default_list_has_the_cards_that_are_there(
    toolkit, monkeypatch, capsys, cards, nvcc, added, said
):
    def capability(index):
        if isinstance(cards[index], Exception):
            raise cards[index]
        return cards[index]

    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(cards))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_capability", capability)
    facts, compiled = toolkit(archs=nvcc)
    assert facts["cuda_archs"] == ["8.0+PTX", "9.0a", *added]
    codes = ["sm_80", "compute_80", "sm_90a", *(f"sm_{arch.replace('.', '')}" for arch in added)]
    for options in compiled.values():
        assert codes_of(options)[-len(codes) :] == codes
    words = capsys.readouterr().out
    assert said in words and ("the card here" in words) == bool(said)


def test_a_list_that_is_asked_for_is_left_as_it_is_whatever_card_is_there(toolkit, monkeypatch):
    def never():
        raise AssertionError("asked for a card")

    monkeypatch.setattr("torch.cuda.is_available", never)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert toolkit()[0]["cuda_archs"] == ["8.0"]


@pytest.mark.parametrize(
    ("archs", "codes", "said"),
    [
        # As an image of NGC has it, less what is below 8.0.
        ("8.0 8.6 9.0 10.0 12.0+PTX", ["sm_90a"], "8.0 8.6 9.0a 10.0 12.0+PTX"),
        ("8.0 9.0+PTX", ["sm_90a", "compute_80"], "8.0 9.0a+PTX"),
        ("9.0 9.0a", ["sm_90a"], "9.0a"),
        ("9.0a 9.0+PTX", ["sm_90a", "compute_80"], "9.0a+PTX"),
        ("9.0a+PTX 8.0+PTX", ["sm_90a", "compute_80"], None),
    ],
)
def test_9_0_is_compiled_as_9_0a_and_said(toolkit, monkeypatch, capsys, archs, codes, said):
    """Kernels on wgmma of 9.0 are empty, and a Hopper could load either; others are empty in its
    PTX, which 10.x and 12.x would compile."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    facts, compiled = toolkit(archs=(75, 80, 86, 90, 100, 120))
    for options in compiled.values():
        found = [code for code in codes_of(options) if code.endswith(("_90", "90a", "compute_80"))]
        assert found == codes
    words = capsys.readouterr().out
    assert ("9.0 is compiled as 9.0a" in words) == (said is not None)
    if said is not None:
        assert f"the kernels are for {said}\n" in words
        assert facts["cuda_archs"] == said.split()

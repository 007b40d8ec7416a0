"""The build and what it says of itself: version, files shipped, build_info, setup.py."""

import importlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

import lora_ext

# By its module name: the attribute lora_ext.build_info is the function.
info_module = importlib.import_module("lora_ext.build_info")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lora_ext.__file__).parent
KEYS = [
    "version",
    "extension",
    "torch_built",
    "torch_running",
    "torch_cuda",
    "compiler",
    "openmp",
    "cuda",
    "cuda_version",
    "cuda_archs",
    "cuda_reason",
    "cuda_driver",
    "cpu_isa",
    "cpu_isas_available",
]


@pytest.fixture
def setup_py(monkeypatch):
    """The names that setup.py defines, without a build."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for variable in ("CUDA_HOME", "CXX", "LORA_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    return runpy.run_path("setup.py")


@pytest.fixture
def build_ext(setup_py, monkeypatch):
    """setup.py's build command for an extension of no sources."""
    monkeypatch.setenv("MAX_JOBS", "1")
    extension = setuptools.Extension("lora_ext._C", [])
    return setup_py["BuildExt"](setuptools.Distribution({"ext_modules": [extension]})), extension


@pytest.fixture
def facts(monkeypatch, tmp_path):
    """Replaces the facts of the build by what the test writes; returns the function to do so."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(info_module, "_FACTS_FILE", path)
    return path.write_text


# Version and files


def test_version_has_one_source():
    stated = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated == [lora_ext.__version__]
    assert importlib.metadata.version("lora_ext") == lora_ext.__version__
    assert json.loads((PACKAGE / "_build.json").read_text())["version"] == lora_ext.__version__
    for path in [ROOT / "setup.py", *PACKAGE.rglob("*.py")]:
        assert lora_ext.__version__ not in path.read_text(), f"{path.name} repeats the version"


def test_a_build_without_a_compiler_says_so(build_ext, tmp_path, monkeypatch):
    command, _ = build_ext
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiler, name in (("", "c++"), ("ccache /nowhere/g++", "/nowhere/g++")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(Exception, match="there is none; install") as caught:
            command.build_extensions()
        assert f"expected a C++ compiler {name!r}" in str(caught.value)


def test_metadata_asks_for_torch_and_what_adapter_files_take():
    needed = [
        requirement
        for requirement in importlib.metadata.requires("lora_ext") or []
        if "extra ==" not in requirement
    ]
    assert sorted(needed) == ["regex", "safetensors>=0.4.3", "torch>=2.11"]


def test_a_wheel_ships_every_file_of_the_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    command = build_py(distribution)
    command.ensure_finalized()
    modules = {Path(path).resolve() for _, _, path in command.find_all_modules()}
    data = {
        Path(folder, name).resolve() for _, folder, _, names in command.data_files for name in names
    }
    wanted = {
        path
        for path in (ROOT / "lora_ext").rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name in {"py.typed", "_build.json"}
    }
    assert wanted <= modules | data
    assert ROOT / "lora_ext" / "py.typed" in data
    assert len(wanted) > 5


# What is loaded


def test_one_openmp_runtime_is_loaded():
    """A second one would ignore torch.set_num_threads: setup.py links none."""
    if lora_ext.build_info()["openmp"] is not True:
        pytest.skip("built without OpenMP: torch's runtime does not answer this compiler")
    script = (
        "import lora_ext, re; maps = open('/proc/self/maps').read(); "
        r"print(*set(re.findall(r'\S*/lib(?:gomp|omp|iomp5)\S*', maps)))"
    )
    loaded = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).split()
    assert len(loaded) == 1, loaded


# build_info


def test_build_info_describes_this_build():
    info = lora_ext.build_info()
    recorded = json.loads((PACKAGE / "_build.json").read_text())
    assert list(info) == KEYS
    assert info["extension"] == "loaded"
    assert info["version"] == lora_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["torch_cuda"] == torch.version.cuda
    assert info["cuda"] == recorded["cuda"] == lora_ext._C.with_cuda
    assert info["cpu_isa"] in [*info["cpu_isas_available"], "library"]
    assert re.search(r"\d+\.\d+", info["compiler"])
    if info["cuda"]:
        assert info["cuda_archs"]
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
        assert info["cuda_reason"] == ""
        assert re.match(r"\d+\.\d|none", info["cuda_driver"])
    else:
        assert info["cuda_archs"] == []
        assert info["cuda_version"] is None
        assert info["cuda_driver"] is None
        assert info["cuda_reason"].endswith("reinstall.")


def test_build_info_prints_a_table():
    lines = str(lora_ext.build_info()).splitlines()
    assert [line.split()[0] for line in lines] == KEYS
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1
    assert f"version             {lora_ext.__version__}" in lines
    assert not any(re.search(r"True|False|None|\[", line) for line in lines)


def test_python_m_lora_ext_prints_the_table():
    printed = subprocess.check_output([sys.executable, "-m", "lora_ext"], cwd=ROOT, text=True)
    assert printed == f"{lora_ext.build_info()}\n"


@pytest.mark.parametrize(
    ("written", "complaint"),
    [(None, "is missing"), ("{", "cannot be read"), ("[1]", "holds no table")],
)
def test_build_info_says_what_is_wrong_with_its_facts(facts, written, complaint):
    if written is not None:
        facts(written)
    info = lora_ext.build_info()
    assert complaint in info["torch_built"]
    assert "pip install ." in info["torch_built"]
    assert str(info)


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), RuntimeError("boom")])
def test_build_info_survives_an_extension_that_does_not_load(monkeypatch, error):
    real_import = importlib.import_module

    def failing_import(name):
        if name == "lora_ext._C":
            raise error
        return real_import(name)

    monkeypatch.setattr(importlib, "import_module", failing_import)
    info = lora_ext.build_info()
    assert list(info) == KEYS
    assert info["extension"] == f"not loaded: {error}"
    assert info["cpu_isa"].startswith("unknown")
    assert info["cpu_isas_available"] == []


@pytest.mark.parametrize(
    ("built", "running", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.13.0", "2.14.0", False),
        ("2.1.0", "2.13.0", False),
    ],
)
def test_torch_mismatch_compares_releases(facts, monkeypatch, built, running, same):
    facts(json.dumps({"torch": built}))
    monkeypatch.setattr(info_module, "_running_torch", lambda: (running, None))
    message = info_module.torch_mismatch()
    assert (message == "") == same
    if not same:
        assert built in message
        assert running in message
        assert message in info_module.import_error_hint()


@pytest.mark.parametrize(
    ("installer", "cure"),
    [
        ("uv\n", "`uv pip install .` inside"),
        ("pip\n", "`pip install .` in"),
        (None, "`pip install .`"),
    ],
)
def test_torch_mismatch_says_what_helps_with_the_installer(facts, monkeypatch, installer, cure):
    """uv builds with the newest torch from outside the tree: to install again does it again."""
    facts(json.dumps({"torch": "2.13.0"}))
    monkeypatch.setattr(info_module, "_running_torch", lambda: ("2.14.0", None))
    copy = SimpleNamespace(read_text={"INSTALLER": installer}.get)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: copy)
    assert f"run {cure}" in info_module.torch_mismatch()


def test_torch_mismatch_of_a_wheel_names_what_pip_can_get(facts, monkeypatch):
    """Who installed a wheel may have neither the sources nor a compiler."""
    facts(json.dumps({"version": "0.1.0+torch2.13.cu130", "torch": "2.13.0+cu130"}))
    monkeypatch.setattr(info_module, "_running_torch", lambda: ("2.14.1+cu130", None))
    assert info_module.torch_mismatch() == (
        "lora_ext was built with torch 2.13.0+cu130, but torch 2.14.1+cu130 is running: "
        "install torch==2.13.*, or a wheel of lora_ext named +torch2.14"
    )


def test_a_long_build_says_how_far_it_is(setup_py, tmp_path):
    (tmp_path / "old.o").touch()
    os.utime(tmp_path / "old.o", (1, 1))
    shown = tmp_path / "terminal"
    with setup_py["progress_line"](str(tmp_path), 7, 0.05, str(shown)):
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "new.o").touch()
        deadline = time.monotonic() + 60
        while "lora_ext: 1 of 7 files compiled after 0.0 min" not in shown.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with setup_py["progress_line"](str(tmp_path), 7, 0.05, str(tmp_path / "no" / "terminal")):
        pass


def test_import_error_hint_without_a_build(facts):
    hint = info_module.import_error_hint()
    assert "_build.json is missing" in hint
    assert "pip install ." in hint


# setup.py


def test_arch_flags(setup_py):
    assert setup_py["arch_flags"](["8.0+PTX", "9.0a", "12.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(CompileError, match=r"expected entries like .* but got 'Hopper'"):
        setup_py["arch_flags"](["Hopper"])


def test_arch_list_is_honoured(setup_py, monkeypatch):
    assert setup_py["CudaToolkit"]().archs == ["8.0+PTX", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a; 10.0+PTX")
    assert setup_py["CudaToolkit"]().archs == ["8.6", "9.0a", "10.0+PTX"]


@pytest.mark.parametrize(
    ("archs", "has_code"),
    [("", True), ("8.0 9.0a+PTX", True), ("8.0;9.0", False), ("9.0+PTX", False)],
)
def test_kernels_on_wgmma_are_launched_only_where_they_were_compiled(
    setup_py, monkeypatch, archs, has_code
):
    """For other architectures they are empty, and lora_wgrad would wait for what they write."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert ("-DLORA_EXT_WITH_SM90A" in setup_py["CudaToolkit"]().flags) == has_code


def test_every_file_is_compiled_once_and_instruction_sets_apart(setup_py, monkeypatch, tmp_path):
    monkeypatch.setitem(setup_py["units_of"].__globals__, "UNITS", tmp_path)
    compiled = setup_py["units_of"](setup_py["sources"]("**/*.cpp"))
    units = [Path(path) for path in compiled if not path.startswith("csrc/")]
    included = [re.findall('#include "(.*)"', unit.read_text()) for unit in units]
    assert 1 < max(map(len, included)) <= setup_py["MOST_A_UNIT"]
    alone = [path for path in compiled if path.startswith("csrc/")]
    assert {path for path in alone if "/isa_" in path} == set(setup_py["sources"]("cpu/isa_*.cpp"))
    there = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cpp")]
    assert sorted([*(f"csrc/{path}" for unit in included for path in unit), *alone]) == sorted(
        f"csrc/{path}" for path in there
    )


def test_only_a_unit_that_changed_is_written(setup_py, monkeypatch, tmp_path):
    """The date of the others says that their objects are up to date."""
    monkeypatch.setitem(setup_py["units_of"].__globals__, "UNITS", tmp_path)
    sources = setup_py["sources"]("**/*.cpp")
    units = [path for path in setup_py["units_of"](sources) if not path.startswith("csrc/")]
    for path in units:
        os.utime(path, (1, 1))
    setup_py["units_of"]([path for path in sources if path != "csrc/route/route.cpp"])
    changed = [Path(path).name for path in units if Path(path).stat().st_mtime != 1]
    assert changed == ["route_1.cpp"]


def test_no_flag_names_a_processor(setup_py):
    flags = setup_py["CXX_FLAGS"] + setup_py["NVCC_FLAGS"]
    assert not [flag for flag in flags if flag.startswith(("-m", "-Ofast", "-ffast-math"))]


@pytest.mark.parametrize("choice", ["auto", "0", "no-card", "1", "yes"])
def test_cuda_choice_without_a_toolkit(build_ext, monkeypatch, tmp_path, choice):
    command, extension = build_ext
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LORA_EXT_CUDA", choice)
    if choice in ("1", "yes"):
        with pytest.raises(CompileError, match=r"No nvcc was found|expected auto, 0 or 1"):
            command.add_cuda(extension)
        return
    facts = command.add_cuda(extension)
    assert facts["cuda"] is False
    said = {"auto": "No nvcc was found", "0": "LORA_EXT_CUDA=0", "no-card": "there is no card"}
    assert said[choice] in facts["cuda_reason"]
    assert extension.sources == ["csrc/cuda/none.cpp"]
    assert extension.extra_objects == []


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
        target.with_suffix(".d").write_text(f"{{target}} : \\\\\\n {header} \\\\\\n")
"""


@pytest.fixture
def toolkit(build_ext, monkeypatch, tmp_path):
    """install(release, archs): a toolkit; returns add_cuda()'s facts and each file's options."""
    command, extension = build_ext

    def install(release="13.0", archs=(75, 80, 90, 100)):
        log = tmp_path / "log"
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        words = {"python": sys.executable, "log": str(log), "archs": archs, "release": release}
        words["header"] = tmp_path / "header.h"
        words["header"].touch()
        nvcc.write_text(NVCC.format(**words))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        command.build_temp = str(tmp_path / "objects")
        facts = command.add_cuda(extension)
        compiled = re.findall(r"(.*) -c (csrc/cuda/\S+)", log.read_text())
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
    files = ["csrc/cuda/dropout.cu", "csrc/cuda/lora_grouped.cu"]
    monkeypatch.setitem(names, "sources", lambda pattern: files)
    toolkit()
    command, extension = build_ext
    log = tmp_path / "log"

    def compiled_again() -> int:
        log.write_text("")
        command.add_cuda(extension)
        return log.read_text().count(" -c csrc/cuda/")

    assert compiled_again() == 0
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert [compiled_again(), compiled_again()] == [2, 0]
    monkeypatch.setitem(names, "NVCC_FLAGS", ["-O2"])
    assert compiled_again() == 2
    os.utime(tmp_path / "header.h", (2**32, 2**32))
    assert compiled_again() == 2


@pytest.mark.parametrize("release", ["11.8", "12.0", "12.4", "12.5"])
def test_an_older_nvcc_builds_for_the_cpu_and_says_why(toolkit, release):
    facts, compiled = toolkit(release)
    assert facts["cuda"] is False and not compiled
    assert f"nvcc {release} is older than 12.6" in facts["cuda_reason"]
    assert facts["cuda_reason"].endswith("then reinstall.")


@pytest.mark.parametrize("release", ["12.6", "13.1", "14.0"])
def test_a_newer_nvcc_builds_the_kernels(toolkit, release):
    facts, compiled = toolkit(release)
    assert facts["cuda"] is True and facts["cuda_version"] == release
    assert {Path(name).name for name in Path(ROOT, "csrc/cuda").glob("*.cu")} == set(compiled)


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


@pytest.mark.parametrize("plain", ["9.0", "9.0+PTX"])
def test_no_empty_kernels_on_wgmma_beside_those_of_9_0a(setup_py, plain):
    """Those of 9.0 are empty, and a Hopper could load either."""
    codes = codes_of(" ".join(setup_py["arch_flags"](["8.0", plain, "9.0a"])))
    assert "sm_90a" in codes and "sm_90" not in codes
    assert ("compute_90" in codes) == plain.endswith("+PTX")
    assert "sm_90" in codes_of(" ".join(setup_py["arch_flags"](["8.0", plain])))


@pytest.mark.parametrize(
    ("cores", "gib", "jobs"), [(16, 128, 16), (16, 4, 4), (16, 20, 10), (2, 3, 1), (1, 1, 1)]
)
def test_jobs_follow_memory_but_not_far_below_the_cores(monkeypatch, setup_py, cores, gib, jobs):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gib * 2**18}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert setup_py["default_jobs"]() == jobs


def test_without_ninja_files_are_compiled_side_by_side(monkeypatch, build_ext):
    command, _ = build_ext
    monkeypatch.setenv("MAX_JOBS", "3")
    together = threading.Barrier(3, timeout=60)

    class Compiler:
        def compile(self, sources, output_dir):
            together.wait()  # for ever, one after the other
            return [f"{output_dir}/{source}.o" for source in sources]

    command.compiler = Compiler()
    command.compile_side_by_side()
    found = command.compiler.compile(["a", "b", "c"], output_dir="out")
    assert found == ["out/a.o", "out/b.o", "out/c.o"]

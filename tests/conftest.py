"""Fixtures: a test runs once for each device, and on the CPU for each instruction set it asks for.

A test that takes `device` runs on the CPU and on CUDA, there by our kernels and by the library
route. One that takes `isa` runs on the CPU under every kernel set of this processor and under
"library" (ATen alone); one that takes both also runs on CUDA. What runs on CUDA has the marker
`gpu`, and is collected where there is a card or `-m` names it.

`make test` runs what has no marker `rest`, which is given here; `make test-rest` has the others.

In the emulated package (tests/emulated/package), CPU tensors stand for CUDA's: `device` is the CPU
and `isa` is None, as on CUDA, and only what takes one of them runs.
"""

import os
import re
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

# Read when cuBLAS starts: without it torch refuses products under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor's cache keeps headers compiled for another ATEN_CPU_CAPABILITY: nothing compiles with
# them.
# Workers of pytest-xdist share the cores, which torch counts when it is imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    own_cores = max(1, len(os.sched_getaffinity(0)) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(own_cores))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    own_cache = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_cache))

import pytest
import torch
import two_processes
from helpers import EMULATED, EMULATED_ROUTE
from other_library import other_library
from rest import REST

import lora_ext
from lora_ext import _C
from lora_ext.kernels.kernel_checks import check_results

# Of the extras. A machine with a GPU and no network may lack some: what needs them is skipped.
OPTIONAL = {
    "accelerate",
    "hypothesis",
    "loralib",
    "matplotlib",
    "numpy",
    "peft",
    "safetensors",
    "transformers",
}

# Test id -> route: our kernels, around torch's base product, torch's products alone.
CUDA = {"cuda": "kernel", "cuda-hybrid": "hybrid", "cuda-library": "library"}

GIB_PER_WORKER = 2

COMPARING_BITS = {
    *("equal", "differing", "assert_as_eager", "assert_equal", "assert_same"),
    *("assert_same_bits", "assert_same_state", "check_product"),
}


def is_rest(path: Path) -> bool:
    """Whether a file, or a folder, is left to `make test-rest` as a whole."""
    here = Path(__file__).parent
    inside = path.relative_to(here).as_posix() if path.is_relative_to(here) else ""
    return any(f"{inside}/".startswith(f"{name}/") for name in REST)


def is_left_out(config, marker: str) -> bool:
    return f"not {marker}" in config.option.markexpr


def names_in(code) -> set[str]:
    inner = (part for part in code.co_consts if hasattr(part, "co_names"))
    return set(code.co_names).union(*map(names_in, inner))


def has_card_or_names_it(config) -> bool:
    return torch.cuda.is_available() or re.search(r"(?<!not )\bgpu\b", config.option.markexpr)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """The cores that this process may use, of hyperthreads all, as far as memory goes."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(gib / GIB_PER_WORKER)))


def pytest_ignore_collect(collection_path, config):
    return True if is_left_out(config, "rest") and is_rest(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before pytest looks at markers."""
    for item in items:
        if is_rest(item.path) or item.get_closest_marker("slow"):
            item.add_marker("rest")
    if EMULATED:
        keep(config, items, lambda item: {"device", "isa"} & set(item.fixturenames))
    if config.getoption("--other-library") is not None:  # which holds copies of its operands
        keep(config, items, lambda item: "peak_bytes" not in names_in(item.function.__code__))
        for item in items:
            if names_in(item.function.__code__) & COMPARING_BITS:
                item.add_marker("bits")
    if not has_card_or_names_it(config):
        keep(config, items, lambda item: not item.get_closest_marker("gpu"))


def keep(config, items, wanted) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


class Part:
    """A part of the tests that the command selects: of a nightly run that takes hours."""

    def __init__(self, part: str) -> None:
        self.number, self.of = map(int, part.split("/"))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """After markers and -k."""
        begin, end = (len(items) * each // self.of for each in (self.number - 1, self.number))
        own = {id(item) for item in items[begin:end]}
        keep(config, items, lambda item: id(item) in own)


def pytest_addoption(parser):
    parser.addoption("--part", metavar="I/N", help="of the selected tests, the I-th of N parts")
    parser.addoption(
        "--no-check-timeout",
        action="store_true",
        help="kernels may take any time in the check of their first use, as under a sanitizer",
    )
    parser.addoption(
        "--other-library",
        type=int,
        metavar="SEED",
        help="torch's products on the CPU round otherwise in each call: tests/other_library.py",
    )


def pytest_configure(config):
    if part := config.getoption("--part"):
        config.pluginmanager.register(Part(part))
    if EMULATED:
        _C.set_cuda_route(EMULATED_ROUTE)
    if config.getoption("--no-check-timeout") and _C.with_cuda:
        lora_ext.kernels.set_check_timeout(None)
    if (seed := config.getoption("--other-library")) is not None:
        other = other_library(seed)
        other.__enter__()
        config.add_cleanup(lambda: other.__exit__(None, None, None))
    # Kernels that fail their check are replaced by the library route, which would pass the tests.
    config.addinivalue_line("filterwarnings", "error:lora_ext. the kernels")


class Module(pytest.Module):
    """A file of tests; one that imports a package that is not there is skipped as a whole."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL:
                pytest.skip(f"needs {cause.name}, which is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


def pytest_generate_tests(metafunc):
    asked = {"isa", "device"} & set(metafunc.fixturenames)
    if EMULATED and asked:
        values = {
            "device": pytest.param("cpu", id="emulated"),
            "isa": pytest.param(None, id="emulated"),
        }
        for name in sorted(asked):
            metafunc.parametrize(name, [values[name]], indirect=True)
    elif asked:
        config, cuda = metafunc.config, CUDA if has_card_or_names_it(metafunc.config) else ()
        best, *others = _C.available_cpu_isas()
        others = [] if is_left_out(config, "rest") else others
        isas = [(best, ()), ("library", ()), *((name, pytest.mark.rest) for name in others)]
        if "isa" not in asked:
            on_cuda = [pytest.param(name, id=name, marks=pytest.mark.gpu) for name in cuda]
            metafunc.parametrize("device", [pytest.param("cpu", id="cpu"), *on_cuda], indirect=True)
        elif "device" in asked:
            on_cpu = [pytest.param("cpu", name, id=f"cpu-{name}", marks=m) for name, m in isas]
            on_cuda = [pytest.param(name, None, id=name, marks=pytest.mark.gpu) for name in cuda]
            metafunc.parametrize(("device", "isa"), [*on_cpu, *on_cuda], indirect=True)
        else:
            on_cpu = [pytest.param(name, id=name, marks=marks) for name, marks in isas]
            metafunc.parametrize("isa", on_cpu, indirect=True)


def why_no_cuda() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if _C.with_cuda else "lora_ext was built without CUDA kernels"


@contextmanager
def float32_sums():
    """cuBLAS may, by default, add the parts of a half product in half: integers are not exact."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


@pytest.fixture
def cuda():
    """For tests of what there is on CUDA alone; they have the marker `gpu`."""
    reason = why_no_cuda()
    if reason:
        pytest.skip(reason)
    with float32_sums():
        yield "cuda"


@pytest.fixture(autouse=True)
def no_failed_check(request):
    """No test passes by the library route where it is the kernels' turn."""
    yield
    on_cuda = request.node.get_closest_marker("gpu") and not why_no_cuda()
    if EMULATED or on_cuda:
        results = check_results("cpu" if EMULATED else None)
        assert {name: why for name, why in results.items() if why != "passed"} == {}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(request):
    if request.param == "cpu":
        yield "cpu"
        return
    reason = why_no_cuda()
    if reason:
        pytest.skip(reason)
    _C.set_cuda_route(CUDA[request.param])
    with float32_sums():
        yield "cuda"
    _C.set_cuda_route("auto")


@pytest.fixture
def isa(request):
    """The CPU kernel set in use, None on CUDA."""
    if request.param is None:
        yield None
        return
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("auto")


@pytest.fixture
def library_route():
    """The CPU's ATen route, whatever the number of rows."""
    _C.set_cpu_isa("library")
    if EMULATED:
        _C.set_cuda_route("library")
    yield
    _C.set_cpu_isa("auto")
    if EMULATED:
        _C.set_cuda_route(EMULATED_ROUTE)


@pytest.fixture(autouse=True)
def one_thread():
    """At the sizes of tests a second thread on a busy machine costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    """Both start, however little there is to do."""
    torch.set_num_threads(2)
    _C.set_cpu_min_work(1)
    yield
    _C.set_cpu_min_work()


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def forget_graphs():
    """Around a test that compiles: nothing compiled before counts, or is left for the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter():
    """A backend that counts the graphs it is given and runs them through AOTAutograd."""
    from torch._dynamo.testing import CompileCounterWithBackend  # a second that few tests need

    return CompileCounterWithBackend("aot_eager")


@pytest.fixture
def cxx_compiler():
    """For tests whose code torch's inductor compiles: there need be no compiler beside a wheel."""
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name) is None:
        pytest.skip(f"needs a C++ compiler for torch's inductor, and there is no {name}")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A valid adapter folder, which tests leave as it is."""
    from hostile_helpers import save_valid  # PEFT takes seconds that few tests need

    folder = tmp_path_factory.mktemp("pristine")
    save_valid(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of the valid adapter folder, to be broken."""
    return shutil.copytree(pristine, tmp_path / "adapter")


@pytest.fixture
def no_hang():
    """A FIFO in the place of a file, or a pattern, would wait for ever."""

    def stop(*_):
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Reports of the module's cases in two_processes."""
    return two_processes.run(request.module.__name__, tmp_path_factory.mktemp("processes"))

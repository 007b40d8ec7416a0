"""Compiles lora_ext._C: torch's BuildExtension for the C++ files, one nvcc rule for the CUDA files.

No .cu file includes torch, so one nvcc command serves CPU and CUDA builds of torch alike, and both
link the static CUDA runtime. docs/build.md gives the reasons.

Environment, read at build time only:
    LORA_EXT_CUDA         auto (default): CUDA kernels if nvcc can build a program here, and
                          torch has CUDA;  1: whatever torch has, and fail if nvcc cannot;
                          0: CPU kernels only;  no-card: the same, as make says where there is
                          no card
    TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0 9.0a+PTX"; 9.0 is taken as 9.0a;
                          default: DEFAULT_ARCHS and the cards here
    CUDA_HOME             CUDA toolkit; default: that of the nvcc on PATH
    CXX                   C++ compiler, g++ 12 or clang 14 or newer; default: c++
    MAX_JOBS              compilers at a time; default: one a core and 2 GiB of memory, but no
                          fewer than one for four cores
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension
except ImportError:  # an sdist, or the metadata alone, needs no torch
    from setuptools.command.build_ext import build_ext as BuildExtension

    torch = None

# sm_80 code also runs on 8.6 and 8.9, and its PTX on 10.x and 12.x; 9.0a is Hopper's own set.
DEFAULT_ARCHS = "8.0+PTX;9.0a"
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
CXX_FLAGS += ["-ffp-contract=off"]  # a multiply-add is fused where a kernel says so, nowhere else
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
# Kept for `make sass`. A message C75xx is shown, too: products on wgmma wait for each other.
PTXAS_REPORT = re.compile(r"ptxas info\b(?!.*\(C75\d\d\))|    \d+ bytes stack frame")
# Without exclude-libs, the shared CUDA runtime that torch loads would answer our calls.
CUDART_LINK = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
CUDART_LINK += ["-Wl,--exclude-libs,libcudart_static.a"]
# Of torch's headers a file takes 5 to 10 seconds, of its own one: files of a folder are compiled
# together. Those that select their instruction set are not: it would hold for the next one.
WITH_TORCH = re.compile(r"csrc/(?:common|cpu(?!/isa_)|op)/")
MOST_A_UNIT = 7
UNITS = Path("build", "units")
GIB_PER_JOB = 2  # a C++ file that includes torch peaks near 1.5 GiB
CUDA_ADVICE = "put a working CUDA toolkit on PATH or in CUDA_HOME, then reinstall"

LEAST_NVCC = (12, 6)  # that of the oldest torch; cudaGetDriverEntryPointByVersion came with 12.5
LEAST_KERNEL_ARCH = 80
LEAST_DROPOUT_ARCH = (
    70  # dropout needs nothing of a card, and the library route runs on any of torch's
)
DROPOUT = "csrc/kernels/launch/dropout.cu"
# Compiled once for each part and type of the kernels' instances, as instances.h names them.
INSTANCES = "csrc/kernels/launch/instances.cu"
PARTS = ["linear", "grouped", "decode", "gemm_sm90a"]
TYPES = {"bf16": "__nv_bfloat16", "fp16": "__half"}
NO_CUDA = "csrc/kernels/launch/none.cpp"  # in place of its .cu, which no other C++ file knows of

PROBE = """
#include <cuda_runtime.h>
__global__ void probe() {}
int main() {
  probe<<<1, 1>>>();
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuInit", &function, 12000, cudaEnableDefault, &found);
}
"""


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def cuda_units() -> list[tuple[str, str, list[str]]]:
    """Of each nvcc command: the .cu file, the path that its object has without a suffix, macros."""
    paths = sources("kernels/launch/*.cu")
    units = [(path, path.removesuffix(".cu"), []) for path in paths if path != INSTANCES]
    for part, type in itertools.product(PARTS if INSTANCES in paths else [], TYPES):
        macros = [f"-DLORA_EXT_PART=LORA_EXT_{part.upper()}", f"-DLORA_EXT_TYPE={TYPES[type]}"]
        units.append((INSTANCES, str(Path(INSTANCES).with_name(f"lora_{part}_{type}")), macros))
    return units


def units_of(sources: list[str]) -> list[str]:
    """Writes C++ files that include those of WITH_TORCH, some each; returns what is to compile.

    A unit that stays as it is keeps its date, and with it its object.
    """
    together = [path for path in sources if WITH_TORCH.match(path)]
    units, alone = [], [path for path in sources if path not in together]
    for folder in sorted({str(Path(path).parent) for path in together}):
        inside = [path for path in together if str(Path(path).parent) == folder]
        count = -(-len(inside) // MOST_A_UNIT)
        for number in range(count):
            own = inside[len(inside) * number // count : len(inside) * (number + 1) // count]
            text = "".join(f'#include "{Path(path).relative_to("csrc")}"\n' for path in own)
            unit = UNITS / f"{Path(folder).name}_{number + 1}.cpp"
            if not unit.exists() or unit.read_text() != text:
                unit.parent.mkdir(parents=True, exist_ok=True)
                unit.write_text(text)
            units.append(str(unit))
    return [*units, *alone]


def default_jobs() -> int:
    """A virtual machine that gets memory as it needs it shows little: it has cores to go by."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(1, cores // 4, int(gib // GIB_PER_JOB)))


def cxx_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def run(command: list[str], **options) -> tuple[int, str]:
    """Runs a command; returns its exit status and what it printed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    return done.returncode, done.stdout


def openmp_flags(compiler: str) -> list[str]:
    """Returns ["-fopenmp"] if torch's own OpenMP runtime answers this compiler's calls, else [].

    The extension is compiled with OpenMP but linked without: its calls resolve to the runtime that
    torch loaded. A second one would ignore torch.set_num_threads, and its omp_get_thread_num
    would say 0 in every thread, so that each would do the whole loop.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    call = "__kmpc_fork_call" if "clang" in compiler else "GOMP_parallel"
    return ["-fopenmp"] if hasattr(ctypes.CDLL(str(library)), call) else []


def arch_number(arch: str) -> str:
    """Returns "90a" for "9.0a+PTX"."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if match is None:
        expected = "entries like 8.0, 9.0a or 8.0+PTX"
        raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected {expected}, but got {arch!r}")
    return match[1] + match[2]


def is_below(arch: str, least: int) -> bool:
    return int(arch_number(arch).rstrip("af")) < least


def with_90a(archs: list[str]) -> list[str]:
    """["8.0", "9.0+PTX"] -> ["8.0", "9.0a+PTX"]: with Hopper's own kernels. Containers and torch's
    own list say 9.0, in which those are empty; a Hopper might load its code beside sm_90a.
    """
    hopper = [arch for arch in archs if arch_number(arch) in ("90", "90a")]
    name = "9.0a+PTX" if any(arch.endswith("+PTX") for arch in hopper) else "9.0a"
    return [*dict.fromkeys(name if arch in hopper else arch for arch in archs)]


def arch_flags(archs: list[str]) -> list[str]:
    """["8.0+PTX"] -> the -gencode flags for sm_80 code and compute_80 PTX.

    That is the PTX of 9.0a, too: no later card runs its own, and kernels are empty in that of 9.0.
    """
    flags = {}
    for arch in archs:
        number = arch_number(arch)
        codes = {"sm": number}
        if arch.endswith("+PTX"):
            codes["compute"] = "80" if number == "90a" else number
        for code, own in codes.items():
            flags[f"-gencode=arch=compute_{own},code={code}_{own}"] = None
    return [*flags]


def cards_here() -> list[int]:
    """[120] where torch sees an RTX 5090; nothing where it sees no card or the driver is broken."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = {torch.cuda.get_device_capability(index) for index in range(count)}
    except Exception:  # of whatever kind: a build needs no card
        return []
    return sorted(10 * major + minor for major, minor in found)


class CudaToolkit:
    """One nvcc, its flags, and the folders it links with (known after `probe`)."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME")
        path = os.path.join(home, "bin") if home else f"{os.environ['PATH']}:/usr/local/cuda/bin"
        self.nvcc = shutil.which("nvcc", path=path)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        self.is_default = not archs
        asked = re.split(r"[;,\s]+", archs or DEFAULT_ARCHS)
        self.old_archs = [arch for arch in asked if is_below(arch, LEAST_KERNEL_ARCH)]
        new_archs = [arch for arch in asked if arch not in self.old_archs] or ["8.0"]
        self.archs = with_90a(new_archs)
        self.notes = []  # what is compiled otherwise than the list says
        if self.archs != new_archs:
            self.notes.append("9.0 is compiled as 9.0a, which has Hopper's own kernels on wgmma")
        self.flags = [*NVCC_FLAGS]
        if "90a" in map(arch_number, self.archs):
            self.flags.append("-DLORA_EXT_WITH_SM90A")
        if "CXX" in os.environ:
            self.flags += ["-ccbin", next(word for word in cxx_command() if "ccache" not in word)]
        self.version = ""
        self.library_dirs: list[str] = []

    def probe(self) -> str:
        """Builds a small program; returns "" if that worked, else one sentence on why not."""
        if self.nvcc is None:
            return f"No nvcc was found: {CUDA_ADVICE}."
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "probe.cu")
            program.write_text(PROBE)
            there = {"cwd": folder, "env": {**os.environ, "TMPDIR": folder}}
            # The nvcc on PATH may be a wrapper; its dry run says where the toolkit is.
            settings = run([self.nvcc, "--dryrun", str(program)], **there)[1]
            self.library_dirs = self._folders(settings, "LIBRARIES")
            release = re.search(r"release (\d+)\.(\d+)", run([self.nvcc, "--version"])[1])
            self.version = ".".join(release.groups()) if release else "of unknown version"
            if release and tuple(map(int, release.groups())) < LEAST_NVCC:
                least = ".".join(map(str, LEAST_NVCC))
                return f"nvcc {self.version} is older than {least}: {CUDA_ADVICE}."
            link = ["-shared", "-cudart=static", "-o", f"{program}.so"]
            if self.is_default:
                self.add_cards(cards_here())
            kernel_archs = arch_flags(self.archs)
            status, said = run(
                [self.nvcc, *self.flags, *kernel_archs, str(program), *link], **there
            )
        if status == 0 and self.library_dirs:
            return ""
        lines = said.strip().splitlines() or ["it names no library folders"]
        error = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
        return f"nvcc {self.version} cannot build a program here ({error}): {CUDA_ADVICE}."

    @staticmethod
    def _folders(settings: str, name: str) -> list[str]:
        line = re.search(rf"^#\$ {name}=(.*)$", settings, re.MULTILINE)
        return [os.path.normpath(flag[2:]) for flag in shlex.split(line[1])] if line else []

    def known_archs(self) -> list[int]:
        listed = run([str(self.nvcc), "--list-gpu-arch"])[1]
        return sorted(map(int, re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)))

    def add_cards(self, cards: list[int]) -> None:
        """Adds code for these cards where the list has none that they run, but PTX, which their
        drivers would compile at first use. A card runs code of its major version, up to its minor.
        """
        for card in cards:
            have = [int(arch_number(arch).rstrip("af")) for arch in self.archs]
            if card < LEAST_KERNEL_ARCH or any(card // 10 * 10 <= arch <= card for arch in have):
                continue
            name = f"{card // 10}.{card % 10}"
            runs = [arch for arch in self.known_archs() if card // 10 * 10 <= arch <= card]
            if runs:
                self.archs.append(f"{runs[-1] // 10}.{runs[-1] % 10}")
                self.notes.append(f"{self.archs[-1]} is added for the card here, of {name}")
            else:
                self.notes.append(
                    f"nvcc {self.version} has no code for the card here, of {name}: its driver "
                    "compiles PTX at first use; a newer toolkit has it"
                )

    def archs_of(self, source: str) -> list[str]:
        """The kernels' architectures; dropout's besides are the older ones that nvcc knows."""
        if source != DROPOUT:
            return self.archs
        known = self.known_archs()
        oldest = [f"{arch / 10}" for arch in known if arch >= LEAST_DROPOUT_ARCH][:1]
        old = [arch for arch in self.old_archs if int(arch_number(arch)) in known]
        return [*dict.fromkeys([*oldest, *old, *self.archs])]

    def say_archs(self) -> None:
        for note in self.notes:
            print(f"lora_ext: {note}; the kernels are for {' '.join(self.archs)}", flush=True)
        if self.old_archs:
            print(
                f"lora_ext: the kernels need compute capability 8.0: for {' '.join(self.old_archs)}"
                f" dropout alone is compiled; the kernels are for {' '.join(self.archs)}",
                flush=True,
            )

    def compile(self, source: str, stem: str, macros: list[str], build_temp: str) -> str:
        """Compiles one .cu file, unless its object is up to date; returns the object's path."""
        target = Path(build_temp, f"{stem}.cu.o")
        depends, stamp = target.with_suffix(".d"), target.with_suffix(".command")
        report = target.with_suffix(".ptxas")
        archs = arch_flags(self.archs_of(source))
        command = [str(self.nvcc), *self.flags, *macros, *archs, "-Icsrc"]
        command += ["-MD", "-MF", str(depends), "-c", source, "-o", str(target)]
        made_by = f"nvcc {self.version}: {shlex.join(command)}"
        if target.exists() and stamp.exists() and stamp.read_text() == made_by:
            listed = depends.read_text().partition(":")[2].replace("\\\n", " ")
            inputs = [Path(word) for word in listed.split()]
            made_at = target.stat().st_mtime
            if all(path.exists() and path.stat().st_mtime <= made_at for path in inputs):
                return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        print(shlex.join(command), flush=True)
        status, said = run(command)
        for line in said.splitlines():
            if not PTXAS_REPORT.match(line):
                print(line)
        if status != 0:
            raise CompileError(f"nvcc failed on {source} for {stem}")
        report.write_text(said)
        stamp.write_text(made_by)
        return str(target)


def check_compiler() -> None:
    name = next(word for word in cxx_command() if "ccache" not in word)
    if shutil.which(name) is None:
        raise CompileError(
            f"lora_ext is compiled here: expected a C++ compiler {name!r}, but there is none; "
            "install g++ 12 or newer (apt-get install g++), or name yours in CXX"
        )


# Of one core, on a Xeon: a C++ file, and a CUDA file for the default architectures.
SECONDS = (16, 130)


def plan_of(files: int, cuda_files: int, why: str) -> str:
    """What is compiled, about how long it takes, and how to change that, as a line of print."""
    jobs = int(os.environ["MAX_JOBS"])
    minutes = math.ceil((files * SECONDS[0] + cuda_files * SECONDS[1]) / jobs / 60)
    what = f"{files} C++ files and {cuda_files} of CUDA kernels" if cuda_files else f"{files} files"
    change = why or "LORA_EXT_CUDA=0 leaves the CUDA kernels out."
    rate = f"about {minutes} min with {jobs} at a time (MAX_JOBS)"
    return f"lora_ext: compiling {what}, {rate}. {change}"


def without_cuda(extension: Extension, reason: str) -> dict:
    extension.sources.append(NO_CUDA)
    return {"cuda": False, "cuda_version": None, "cuda_archs": [], "cuda_reason": reason}


@contextlib.contextmanager
def progress_line(
    folder: str, total: int, every_s: float = 30.0, terminal: str = "/dev/tty", plan: str = ""
):
    """The plan and then a line on the terminal now and then: pip shows nothing of a build, which
    takes minutes.
    """
    print(plan, flush=True)
    try:
        shown = Path(terminal).open("w")  # noqa: SIM115 (entered below)
    except OSError:  # nobody watches
        yield
        return
    began, done = time.time(), threading.Event()

    def compiled() -> int:
        objects = [path for path in Path(folder).rglob("*.o") if path.exists()]
        return sum(path.stat().st_mtime > began - 1 for path in objects)  # a file's clock is coarse

    def watch() -> None:
        while not done.wait(every_s):
            minutes = (time.time() - began) / 60
            line = f"lora_ext: {compiled()} of {total} files compiled after {minutes:.1f} min"
            print(f"\n{line}", file=shown, flush=True)

    with shown:
        print(f"\n{plan}", file=shown, flush=True)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


class BuildExt(BuildExtension):
    """Gives the extension its torch and CUDA settings, builds it, writes lora_ext/_build.json."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # setuptools compares dates alone, and a new torch may have older ones
        if torch is not None:  # one folder a torch; setuptools gives editable builds a passing one
            tags = [sysconfig.get_platform(), sys.implementation.cache_tag, torch.__version__]
            self.build_temp = os.path.join("build", "-".join(["temp", *tags]))

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("lora_ext._C")).parent  # in the tree, if editable
        Path(package, "_build.json").write_text(json.dumps(self.facts, indent=2) + "\n")

    def build_extensions(self) -> None:
        if torch is None:
            raise CompileError("lora_ext compiles against torch>=2.11, and there is no torch here")
        check_compiler()
        os.environ.setdefault("MAX_JOBS", str(default_jobs()))
        self.extensions[0].sources = units_of(self.extensions[0].sources)
        toolkit, why = self.choose_cuda()
        counts = len(self.extensions[0].sources) + (toolkit is None), len(cuda_units())
        counts = counts if toolkit else (counts[0], 0)
        with progress_line(self.build_temp, sum(counts), plan=plan_of(*counts, why)):
            self.build_all(toolkit, why)

    def build_all(self, toolkit: CudaToolkit | None, why: str) -> None:
        compiler = run([*cxx_command(), "--version"])[1].partition("\n")[0]
        openmp = openmp_flags(compiler)
        (extension,) = self.extensions
        extension.extra_compile_args += [*CXX_FLAGS, *openmp]
        extension.include_dirs += cpp_extension.include_paths()
        extension.library_dirs += cpp_extension.library_paths()
        extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
        self.facts = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": compiler,
            "openmp": bool(openmp),
            **self.add_cuda(extension, toolkit, why),
        }
        if not cpp_extension.is_ninja_available():
            self.compile_side_by_side()
        super().build_extensions()

    def compile_side_by_side(self) -> None:
        """Without ninja setuptools compiles one file after the other, for minutes."""
        one_by_one = self.compiler.compile

        def compile(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                objects = pool.map(lambda source: one_by_one([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile

    @staticmethod
    def choose_cuda() -> tuple[CudaToolkit | None, str]:
        """The toolkit that compiles the .cu files, or None and the reason, by LORA_EXT_CUDA."""
        choice = os.environ.get("LORA_EXT_CUDA", "").strip() or "auto"
        if choice not in ("auto", "0", "1", "no-card"):
            raise CompileError(f"LORA_EXT_CUDA: expected auto, 0 or 1, but got {choice!r}")
        if choice == "0":
            return None, "LORA_EXT_CUDA=0 was set for the build: unset it, then reinstall."
        if choice == "no-card":
            return None, (
                "make builds without CUDA where there is no card: set LORA_EXT_CUDA=1 to build "
                "it all the same, then reinstall."
            )
        if choice == "auto" and torch.version.cuda is None:
            return None, (
                f"CUDA kernels are left out: torch {torch.__version__} has no CUDA and never runs "
                "them; install a torch with CUDA, or set LORA_EXT_CUDA=1 to build them all the "
                "same, then reinstall."
            )
        toolkit = CudaToolkit()
        reason = toolkit.probe()
        if reason and choice == "1":
            raise CompileError(f"LORA_EXT_CUDA=1, but the CUDA kernels cannot be built. {reason}")
        return (None, reason) if reason else (toolkit, "")

    def add_cuda(self, extension: Extension, toolkit: CudaToolkit | None, reason: str) -> dict:
        """Compiles the .cu files if there is a toolkit; returns the facts."""
        if toolkit is None:
            return without_cuda(extension, reason)
        toolkit.say_archs()
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
            jobs = [pool.submit(toolkit.compile, *unit, self.build_temp) for unit in cuda_units()]
            extension.extra_objects += [job.result() for job in jobs]
        extension.library_dirs += toolkit.library_dirs
        extension.extra_link_args += CUDART_LINK
        return {
            "cuda": True,
            "cuda_version": toolkit.version,
            "cuda_archs": toolkit.archs,
            "cuda_reason": "",
        }


setup(
    ext_modules=[
        Extension(
            "lora_ext._C",
            [path for path in sources("**/*.cpp") if path != NO_CUDA],
            include_dirs=[str(Path("csrc").resolve())],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)

"""The passes on AMX tiles run on processors without them: their tiles are software here. The walk
by vdpbf16ps is compared with the same loops, in the processor's own instructions."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-Werror=frame-larger-than=65536"]  # a thread's stack may have 256 KB


def flags_of_processor() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


pytestmark = pytest.mark.skipif(
    not {"avx512_bf16", "avx512bw", "avx512vl"} <= flags_of_processor(),
    reason="this processor lacks AVX512_BF16",
)


def compiled(folder, source, *more):
    out = folder / f"{Path(source).stem}.o"
    subprocess.run([*COMPILER, *FLAGS, *more, "-c", str(source), "-o", str(out)], check=True)
    return str(out)


OTHERS = [f"csrc/cpu/isa_{name}.cpp" for name in ("avx512_bf16", "avx512", "portable")]
OTHERS.append("tests/cpu/compare_amx.cpp")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The objects of the program beside isa_amx.cpp."""
    folder = tmp_path_factory.mktemp("others")
    return [compiled(folder, ROOT / source) for source in OTHERS]


def build(folder, amx_source, others, *more):
    """The program with the passes of a source of isa_amx.cpp."""
    own = compiled(folder, amx_source, "-include", str(HERE / "software_tiles.h"), *more)
    program = folder / "compare_amx"
    subprocess.run([*COMPILER, *more, own, *others, "-o", str(program)], check=True)
    return program


def run(program, *more):
    return subprocess.run([program, *more], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_tiles_compute_what_vectors_do(tmp_path, others):
    done = run(build(tmp_path, ROOT / "csrc/cpu/isa_amx.cpp", others))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout == "7968 cases, 0 differ\n"


@pytest.mark.slow
def test_tiles_stay_within_their_memory(tmp_path):
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=alignment"]
    flags += ["-Wno-frame-larger-than"]  # of variables that are kept apart
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([*COMPILER, *flags, probe, "-o", tmp_path / "probe"]).returncode != 0:
        pytest.skip("this compiler has no sanitizers")
    others = [compiled(tmp_path, ROOT / source, *flags) for source in OTHERS]
    program = build(tmp_path, ROOT / "csrc/cpu/isa_amx.cpp", others, *flags)
    done = run(program, "13")  # every 13th case
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000]


FAULTS = [
    ("amx_shrink.h", "index[range.begin + m]", "(range.begin + m)"),
    ("amx_wgrad.h", "index[range.begin + m + i]", "index[range.begin + m]"),
    ("amx_expand.h", "args.rows[row + m]", "(row + m)"),
    ("pairs.h", "lo = to_half(_mm512_maskz_mov_ps(", "lo = to_half(_mm512_maskz_mov_ps(0u & "),
    ("amx_packing.h", "keep.words[i * keep.pitch", "keep.words[0 * keep.pitch"),
    ("amx_rounding.h", "keep[row * keep_pitch]", "keep[0 * keep_pitch]"),
    ("amx_product.h", "if (!is_same) packed_ = nullptr;", ""),
    ("amx_product.h", "if (task_->cols.begin == 0) std::copy_n", "if (false) std::copy_n"),
    ("amx_product.h", "if (steps.begin == 0) std::fill_n(sums", "if (false) std::fill_n(sums"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before", "after"), FAULTS)
def test_a_planted_fault_is_seen(tmp_path, others, name, before, after):
    header, source = tmp_path / name, tmp_path / "isa_amx.cpp"
    text = (ROOT / "csrc/cpu" / name).read_text()
    assert before in text
    header.write_text(text.replace(before, after))
    text = (ROOT / "csrc/cpu/isa_amx.cpp").read_text()
    source.write_text(text.replace(f'"cpu/{name}"', f'"{header}"'))
    done = run(build(tmp_path, source, others), "first")
    assert done.returncode == 1, done.stdout[-2000:]
    assert "differs: " in done.stdout

"""The passes on AMX tiles run on processors without them: their tiles are software here."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{ROOT / 'csrc'}"]


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


def build(folder, amx_source):
    """The program with the passes of a source of isa_amx.cpp."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    objects = []
    sources = [
        (amx_source, ["-include", str(HERE / "software_tiles.h")]),
        (ROOT / "csrc/cpu/isa_avx512.cpp", []),
        (ROOT / "csrc/cpu/isa_portable.cpp", []),
        (HERE / "compare_amx.cpp", []),
    ]
    for source, more in sources:
        objects.append(str(folder / f"{Path(source).stem}.o"))
        subprocess.run([*compiler, *FLAGS, *more, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "compare_amx"
    subprocess.run([*compiler, *objects, "-o", str(program)], check=True)
    return program


def run(program):
    return subprocess.run([program], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_tiles_compute_what_vectors_do(tmp_path):
    done = run(build(tmp_path, ROOT / "csrc/cpu/isa_amx.cpp"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout == "5664 cases, 0 differ\n"


FAULTS = {
    "amx_shrink.h": ("index[range.begin + m]", "(range.begin + m)"),
    "amx_wgrad.h": ("const BFloat16 *even = row_at(m), *odd = row_at(m + 1);",
                    "const BFloat16 *even = row_at(m), *odd = row_at(m);"),
    "amx_product.h": ("if (!is_same) packed_ = nullptr;", ""),
    "amx_expand.h": ("args.rows[row + m]", "(row + m)"),
    "amx_tiles.h": ("lo = to_half(_mm512_maskz_mov_ps(", "lo = to_half(_mm512_maskz_mov_ps(0u & "),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, name):
    before, after = FAULTS[name]
    copies = tmp_path / "cpu"
    copies.mkdir()
    for header in ("amx_tiles.h", "amx_shrink.h", "amx_expand.h", "amx_wgrad.h", "amx_product.h"):
        text = (ROOT / "csrc/cpu" / header).read_text()
        if header == name:
            assert before in text
            text = text.replace(before, after)
        (copies / header).write_text(text)
    source = tmp_path / "isa_amx.cpp"
    text = (ROOT / "csrc/cpu/isa_amx.cpp").read_text()
    source.write_text(text.replace('#include "cpu/amx_', f'#include "{copies}/amx_'))
    done = run(build(tmp_path, source))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "differs: " in done.stdout

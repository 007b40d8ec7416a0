"""scripts/check_offsets.py: no edit that computes an offset in 32 bits passes `make lint`."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import check_offsets

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not Path(sysconfig.get_path("scripts"), "clang-tidy").exists(),
        reason="clang-tidy comes with `make lint`: pip install 'lora_ext[dev]'",
    ),
]

PRODUCT, CUT, NARROWED = "a product of 32 bits", "a value of 64 bits is cut", "narrowing conversion"
# Header of csrc/kernels/, right text, wrong text, what is said of it.
EDITS = [
    (
        "gemm/sm80/epilogue.h",
        "static_cast<int64_t>(row) * p.y_pitch + column",
        "row * static_cast<int>(p.y_pitch) + column",
        CUT,
    ),
    ("skinny/elementwise.h", "const int64_t at = row", "const int at = row", NARROWED),
    (
        "dequantize/formats.h",
        "scale_of(p, (first >> p.block_bits) + min(lane, last_block))",
        "scale_of(p, static_cast<int>(first >> p.block_bits) + min(lane, last_block))",
        CUT,
    ),
    (
        "dequantize/formats.h",
        "const int64_t row = first / p.columns;",
        "const int row = static_cast<int>(first / p.columns);",
        CUT,
    ),
    (
        "experts/factors.h",
        "(int64_t{in_pool(expert)} * p.out + row) * p.terms * p.width;",
        "(in_pool(expert) * p.out + row) * p.terms * p.width;",
        PRODUCT,
    ),
    (
        "experts/slots.h",
        "rows + positions[i] * p.pitch",
        "rows + static_cast<int>(positions[i] * p.pitch)",
        CUT,
    ),
    (
        "skinny/shrink.h",
        "static_cast<int64_t>(blockIdx.z) * p.m * p.columns",
        "blockIdx.z * p.m * p.columns",
        PRODUCT,
    ),
    (
        "skinny/dsdb.h",
        "static_cast<int64_t>(blockIdx.y) * p.columns * p.n",
        "static_cast<int64_t>(blockIdx.y * p.columns * p.n)",
        PRODUCT,
    ),
    (
        "skinny/dsdb.h",
        "float* z = p.z + static_cast<int64_t>(blockIdx.x) * p.m * p.columns;",
        "const int at = static_cast<int>(blockIdx.x) * p.m * p.columns; float* z = p.z + at;",
        PRODUCT,
    ),
    (
        "skinny/dsdb.h",
        "g[static_cast<int64_t>(column) * p.n + n] = db[chunk][j][e];",
        "{ const int at = column * p.n; g[at + n] = db[chunk][j][e]; }",
        PRODUCT,
    ),
    (
        "skinny/wgrad.h",
        "static_cast<int64_t>(column) * product.c + c",
        "static_cast<uint32_t>(column) * product.c + c",
        PRODUCT,
    ),
    (
        "skinny/elementwise.h",
        "const int64_t count = static_cast<int64_t>(p.m) * p.width",
        "const int64_t count = p.m * p.width",
        PRODUCT,
    ),
    (
        "gemm/sm80/loads.h",
        "(static_cast<int64_t>(position) * matrix.pitch + column)",
        "static_cast<int>(position * matrix.pitch + column)",
        CUT,
    ),
    (
        "tile/copy.h",
        "matrix.data + offset;",
        "matrix.data + (unsigned)offset;",
        CUT,
    ),
]


def test_our_offsets_have_64_bits():
    assert check_offsets.findings() == []


def test_each_of_these_edits_is_seen(tmp_path):
    for folder in ("csrc", "emulator", "tests/emulated"):
        shutil.copytree(build.ROOT / folder, tmp_path / folder)
    expected = []
    for header, right, wrong, what in EDITS:
        path = tmp_path / "csrc" / "kernels" / header
        text = path.read_text()
        assert text.count(right) == 1, f"{header} no longer has {right!r} once"
        line = text[: text.index(right)].count("\n") + 1
        path.write_text(text.replace(right, wrong))
        expected.append((f"csrc/kernels/{header}:{line}:", what))
    found = check_offsets.findings(tmp_path)
    for place, what in expected:
        assert any(line.startswith(place) and what in line for line in found), (place, what, found)


def test_a_failing_clang_tidy_is_no_clean_bill(tmp_path):
    with pytest.raises(RuntimeError, match="clang-tidy failed"):
        check_offsets.findings(tmp_path)

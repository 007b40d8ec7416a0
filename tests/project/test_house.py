"""The rules of the house that no linter knows: scripts/check_house.py."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("csrc/kernels/launch/shrink.cu", 'asm volatile("nanosleep.u32 1;");', True),
        ("csrc/ptx/wgmma.h", 'asm volatile("wgmma.fence.sync.aligned;");', False),
        ("csrc/kernels/launch/shrink.cu", "#include <ATen/core/Tensor.h>", True),
        ("csrc/kernels/dropout.h", "#include <ATen/core/Tensor.h>", True),
        ("csrc/cpu/isa_avx2.cpp", "#include <c10/util/BFloat16.h>", True),
        ("csrc/cpu/driver.cpp", "#include <ATen/Parallel.h>", False),
        ("csrc/op/lora.cpp", '#include "op/checks.h"', False),
        ("csrc/op/lora.cpp", '#include "common/call.h"', False),
        ("csrc/op/library/dropout.cpp", '#include "op/checks.h"', True),
        ("csrc/op/lora.cpp", '#include "checks.h"', True),
        ("csrc/op/lora.cpp", '#include "kernels/lora_linear.h"', False),
        ("csrc/kernels/gemm/sm80/kernel.h", '#include "kernels/tile/halves.h"', False),
        ("csrc/kernels/gemm/sm80/kernel.h", '#include "kernels/skinny/elementwise.h"', True),
        ("csrc/kernels/tile/halves.h", '#include "kernels/lora_linear.h"', True),
        ("csrc/cpu/driver.cpp", '#include "kernels/plan/plan.h"', True),
        ("csrc/kernels/plan/plan.cpp", '#include "cpu/driver.h"', True),
        ("csrc/new/lora.cpp", '#include "common/call.h"', True),
        ("emulator/oracles/layouts.cpp", '#include "ptx/wgmma_operands.h"', False),
        ("emulator/oracles/layouts.cpp", '#include "kernels/tile/halves.h"', True),
        ("emulator/run.py", "from emulator import kept", False),
        ("emulator/run.py", "from emulated import mutants", True),
        ("docs/build.md", "cd /" + "home/somebody/lora_ext", True),
        ("docs/build.md", "src/" + "home/index.md", False),
    ],
)
def test_house_rules(name, line, wrong):
    breaches = runpy.run_path(str(ROOT / "scripts" / "check_house.py"))["breaches"]
    assert [number for number, _ in breaches(name, f"\n{line}\n")] == ([2] if wrong else [])


@pytest.mark.parametrize(
    ("lower", "around"),
    [
        ("import p._C as _C", []),
        ("from . import _C", ["p.lower", "p.__init__", "p.upper", "p.lower"]),
        ("import p.upper", ["p.lower", "p.upper", "p.lower"]),
        ("from p.upper import f", ["p.lower", "p.upper", "p.lower"]),
        ("from .upper import f", ["p.lower", "p.upper", "p.lower"]),
        ("def f():\n    from . import upper", ["p.lower", "p.upper", "p.lower"]),
        ("if TYPE_CHECKING:\n    from .upper import f", ["p.lower", "p.upper", "p.lower"]),
        ("from .package.inner import f", ["p.lower", "p.package.inner", "p.lower"]),
        ("from . import package", ["p.lower", "p.package.__init__", "p.package.inner", "p.lower"]),
        (
            "from .packages import inner",
            ["p.lower", "p.packages.inner", "p.package.__init__", "p.package.inner", "p.lower"],
        ),
        ("from .tools.leaf import f", ["p.lower", "p.tools", "p.lower"]),
    ],
)
def test_circles_of_imports_are_found(lower, around):
    circle = runpy.run_path(str(ROOT / "scripts" / "check_house.py"))["circle"]
    modules = {
        "p.__init__": "from .upper import f",
        "p.lower": lower,
        "p.upper": "from .lower import f",
        "p.package.__init__": "from .inner import f",
        "p.package.inner": "from ..lower import f\nfrom . import other",
        "p.package.other": "",
        "p.packages.inner": "from .. import package",
        "p.tools.leaf": "",
        "p.tools.other": "from ..lower import f",
    }
    found = circle(modules)
    assert sorted(set(found)) == sorted(set(around)) and found[:1] == found[-1:]


@pytest.mark.parametrize(
    ("source", "height", "wrong"),
    [
        ("", 3, []),
        ("from . import dtypes", 4, []),
        ("from . import _C", 3, ["lora_ext.__init__"]),
        ("from .nn.base import f", 3, ["lora_ext.nn.base"]),
        ("from . import flops", 3, ["lora_ext.flops"]),
        ("if TYPE_CHECKING:\n    from .nn.base import f", 3, ["lora_ext.nn.base"]),
    ],
)
def test_rooms_import_only_what_stands_below(source, height, wrong):
    floors = runpy.run_path(str(ROOT / "scripts" / "check_house.py"))["floors"]
    modules = {
        "lora_ext.__init__": "from .nn import base",
        "lora_ext.nn.base": "from ..packing import f\nfrom . import other",
        "lora_ext.nn.other": "",
        "lora_ext.packing": source,
        "lora_ext.flops": "",
        "lora_ext.dtypes": "",
    }
    expected = "lora_ext.packing must not import {}, which does not stand below it"
    assert floors(modules) == (height, [expected.format(other) for other in wrong])
    assert floors({**modules, "lora_ext.attic.box": ""}) == (
        0,
        ["expected each room in FLOORS, but attic is not"],
    )

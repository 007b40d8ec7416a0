"""`make sass`: every kernel's registers, occupancy and instructions, as ptxas compiles them."""

import importlib.util
import json

import pytest

from emulator import build, cuda_headers

pytestmark = pytest.mark.kernels

spec = importlib.util.spec_from_file_location("sass", build.ROOT / "scripts" / "sass.py")
sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sass)

KERNELS = {"sm_80": 56, "sm_90a": 56 + 72 + 36}


@pytest.fixture(scope="module", params=KERNELS)
def examined(request):
    if cuda_headers.nvcc() is None:
        pytest.skip("no nvcc found: put a CUDA toolkit's nvcc on PATH or set CUDA_HOME")
    return request.param, *sass.examine(request.param)


def test_no_kernel_spills_or_lacks_its_instructions(examined):
    arch, kernels, wrong = examined
    assert wrong == []
    assert len(kernels) == len({kernel.name for kernel in kernels}) == KERNELS[arch]
    rows = json.loads((sass.BUILD / f"{arch}.json").read_text())
    assert [row["name"] for row in rows] == [kernel.name for kernel in kernels]
    for row in rows:
        assert row["blocks_per_sm"] >= 1 and row["registers"] <= 255


def test_consumer_cards_hold_all_but_the_two_large_tiles(examined):
    _, kernels, _ = examined
    too_large = {k.name for k in kernels if k.blocks(*sass.SHARED_OF_CONSUMER_CARDS) == 0}
    sm80 = [name for name in too_large if "sm90a" not in name]
    assert all("128x256" in name or "128x128" in name for name in sm80) and sm80


def test_fault_sites_leave_nothing_behind(examined):
    arch, _, _ = examined
    for source in sass.SOURCES_OF[arch]:
        code = (sass.BUILD / f"{source}.{arch}.cubin").read_bytes()
        assert all(site not in code for site in (b"copy.", b"loop.", b"consumer.", b"bias."))


def kernel(**changes):
    opcodes = {"HMMA": 64, "LDGSTS": 8, "LDSM": 24, "LDL": 0, "STL": 0, "BAR": 1}
    opcodes.update(changes.pop("opcodes", {}))
    return sass.Kernel(
        "lora_gemm 128x64 bf16", "sm_80", 128, 78848, 142, opcodes=opcodes, **changes
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack_bytes": 16}, "16 bytes of stack"),
        ({"spill_bytes": 8}, "8 of spills"),
        ({"opcodes": {"LDL": 2}}, "2 LDL"),
        ({"opcodes": {"STL": 3}}, "3 STL"),
        ({"opcodes": {"HMMA": 0}}, "no HMMA"),
        ({"opcodes": {"LDSM": 0}}, "no LDSM"),
        ({"opcodes": {"LDGSTS": 0}}, "no LDGSTS"),
    ],
)
def test_what_is_wrong_is_named(changes, words):
    assert kernel().objections() == []
    [line] = kernel(**changes).objections()
    assert words in line and line.startswith("lora_gemm 128x64 bf16 on sm_80")


def sm90a_kernel(groups=(4, 4, 2), **changed):
    opcodes = dict.fromkeys([*sass.OPCODES, *sass.OPCODES_SM90A], 1)
    opcodes.update(LDL=0, STL=0, HGMMA=sum(groups))
    opcodes.update(changed)
    name = "lora_gemm_sm90a 128x256 bf16 MN-major tail 2"
    return sass.Kernel(name, "sm_90a", 384, 229440, 168, 0, 0, opcodes, list(groups))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"UTMALDG": 0}, "no UTMALDG"),
        ({"MULTICAST": 0}, "no MULTICAST"),
        ({"USETMAXREG": 0}, "no USETMAXREG"),
        ({"STL": 1}, "1 STL"),
        ({"HGMMA": 11}, "groups of [4, 4, 2] HGMMA"),  # one outside all groups
        ({"groups": (4, 4, 4)}, "groups of [4, 4, 4] HGMMA"),
        ({"groups": (1, 3, 4, 2)}, "groups of [1, 3, 4, 2] HGMMA"),
    ],
)
def test_what_is_wrong_with_wgmma_is_named(changes, words):
    assert sm90a_kernel().objections() == []
    [line] = sm90a_kernel(**changes).objections()
    assert words in line


def test_a_wait_between_wgmmas_divides_their_group():
    step = [("WARPGROUP", ".ARRIVE"), *[("UIADD3", ""), ("HGMMA", ".64x256x16")] * 4]
    wait = ("WARPGROUP", ".DEPBAR.LE")
    assert sass.wgmma_groups([*step, wait, *step, wait]) == [4, 4]
    assert sass.wgmma_groups([*step[:3], wait, *step[3:], wait]) == [1]


def test_blocks_of_an_sm_by_hand():
    # 142 registers: rounded up to 144 a thread, 18,432 a block: three by registers, two by shared
    # memory (2 x 79,872 of 167,936).
    assert kernel().blocks(167936, 166912) == 2
    assert kernel().blocks(102400, 101376) == 1
    assert kernel().blocks(70000, 69000) == 0

"""`make sass`: every kernel's registers, occupancy and instructions, as ptxas compiles them."""

import json
import re
import sys

import pytest

from emulator import build, cuda_headers

pytestmark = pytest.mark.kernels

sys.path.insert(0, str(build.ROOT / "scripts"))
import census  # noqa: E402
import sass  # noqa: E402
import sass_kernels  # noqa: E402
import sass_paths  # noqa: E402


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def examined(request):
    if not sass.is_built():
        pytest.skip("the package was built without CUDA kernels")
    return request.param, *sass.examine(request.param)


def test_no_kernel_spills_or_lacks_its_instructions(examined):
    arch, kernels, wrong = examined
    assert wrong == []
    assert len(kernels) == len({kernel.name for kernel in kernels})
    cards = {"sm_80": ("A100", "L40S"), "sm_90a": ("H100",)}[arch]
    launched = set().union(*(census.launched(census.CARDS[card]) for card in cards))
    named = {census.untyped(kernel.name) for kernel in kernels}
    assert launched <= named and all(map(census.reason, named - launched))
    rows = json.loads((sass.BUILD / f"{arch}.json").read_text())
    assert [row["name"] for row in rows] == [kernel.name for kernel in kernels]
    for row in rows:
        assert row["blocks_per_sm"] >= 1 and row["registers"] <= 255


# nvcc 13.0, of a kernel that writes an accumulator while its product is in flight, and of another.
SERIALISED = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'touched' for 'sm_90a'
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_products_that_wait_for_each_other_are_refused():
    report = sass.report_for("sm_90a", SERIALISED)
    assert "touched" in report and "other" not in report
    assert sass.serialised(report) == [SERIALISED.splitlines()[0]]


def test_consumer_cards_hold_all_but_hopper_s(examined):
    _, kernels, _ = examined
    too_large = {k.name for k in kernels if k.blocks(*sass.SHARED_OF_CONSUMER_CARDS) == 0}
    assert too_large == {k.name for k in kernels if k.is_sm90a}


def loop(main=True, membar=0, wide=None, local=0, divisions=0, instructions=500, waited=(0, 0)):
    wide = membar if wide is None else wide
    rest = (divisions, instructions, {"tensor": 64}, *waited)
    return sass_kernels.MultiplyingLoop("0770-0c80", main, membar, wide, local, *rest)


LOOPS = [loop(), loop(main=False)]


def kernel(name="lora_gemm 128x64 bf16", loops=LOOPS, opcodes=None, **changes):
    opcodes = {"HMMA": 64, "LDGSTS": 8, "LDSM": 24, "LDL": 0, "STL": 0, "BAR": 1, **(opcodes or {})}
    fields = {"opcodes": opcodes, "loops": loops, **changes}
    return sass_kernels.Kernel(name, "sm_80", 128, 78848, 142, **fields)


def sm90a_kernel(groups=(4, 4, 1), loops=LOOPS, lane_loops=0, kernel="lora_gemm", **changed):
    opcodes = dict.fromkeys([*sass_kernels.OPCODES, *sass_kernels.OPCODES_SM90A], 1)
    opcodes |= {"LDL": 0, "STL": 0, "HGMMA": sum(groups), **changed}
    name = f"{kernel}_sm90a 128x256 bf16 MN-major tail 1"
    fields = {"opcodes": opcodes, "groups": list(groups), "loops": loops, "lane_loops": lane_loops}
    return sass_kernels.Kernel(name, "sm_90a", 384, 229440, 168, **fields)


OF_EXPERTS = "lora_grouped_gemm_own_weights"


def dequantizing(name, values, tile, wide_stores):
    opcodes = dict.fromkeys(sass_kernels.OPCODES, 0)
    fields = {"values": values, "tile": tile, "wide_stores": wide_stores}
    return sass_kernels.Kernel(name, "sm_80", 256, 0, 32, opcodes=opcodes, **fields)


def decoding(step, loops=LOOPS):
    opcodes = {"HMMA": 6, "LDSM": 6, "LDGSTS": 16, "BAR": 0}
    return kernel("lora_decode bf16 8", loops, opcodes, step=step)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (kernel(), None),
        (kernel(stack_bytes=16), "16 bytes of stack"),
        (kernel(spill_bytes=8), "8 of spills"),
        (kernel(opcodes={"LDL": 2}), "2 LDL"),
        (kernel(opcodes={"STL": 3}), "3 STL"),
        (kernel(opcodes={"HMMA": 0}), "no HMMA"),
        (kernel(opcodes={"LDSM": 0}), "no LDSM"),
        (kernel(opcodes={"LDGSTS": 0}), "no LDGSTS"),
        (kernel(loops=[loop(membar=2)]), "2 MEMBAR in the loop at 0770-0c80"),
        (kernel(loops=[loop(), loop(main=False, membar=1)]), "1 MEMBAR in the loop"),
        (kernel(loops=[loop(membar=1, wide=0)]), "1 MEMBAR in the loop"),
        (kernel(loops=[loop(local=3)]), "3 LDL and STL in the loop"),
        (kernel(loops=[]), "no loop multiplies"),
        (kernel(loops=[loop(waited=(8, 1))]), "8 plain loads before products at 0770-0c80: 1"),
        (kernel(loops=[loop(instructions=513)]), "513 instructions for 64 products at 0770-0c80"),
        (kernel(loops=[loop(divisions=2)]), None),
        (sm90a_kernel(), None),
        (sm90a_kernel(UTMALDG=0), "no UTMALDG"),
        (sm90a_kernel(MULTICAST=0), "no MULTICAST"),
        (sm90a_kernel(USETMAXREG=0), "no USETMAXREG"),
        (sm90a_kernel(STL=1), "1 STL"),
        (sm90a_kernel(HGMMA=10), "groups of [4, 4, 1] HGMMA"),  # one outside all groups
        (sm90a_kernel(groups=(4, 4, 4)), "groups of [4, 4, 4] HGMMA"),
        (sm90a_kernel(groups=(1, 3, 4, 1)), "groups of [1, 3, 4, 1] HGMMA"),
        (sm90a_kernel(lane_loops=6), "6 BRA.U.ANY"),
        (sm90a_kernel(kernel=OF_EXPERTS, MULTICAST=0, UTMASTG=0, ACQBULK=0), None),
        (sm90a_kernel(kernel=OF_EXPERTS, LDGSTS=0), "no LDGSTS"),
        (sm90a_kernel((4, 4, 4), kernel=OF_EXPERTS), "groups of [4, 4, 4] HGMMA"),
        (dequantizing("dequantize_4bit bf16", 32, 206, 4), None),
        (dequantizing("dequantize_4bit float", 16, 142, 4), None),
        (dequantizing("dequantize_4bit bf16", 32, 330, 4), "10.3 instructions a value"),
        (dequantizing("dequantize_4bit float", 16, 330, 4), "20.6 instructions a value"),
        (dequantizing("dequantize_8bit fp16", 32, 206, 0), "0 stores of 16 bytes"),
        (dequantizing("dequantize_8bit e4m3 bf16", 32, 396, 4), None),
        (dequantizing("dequantize_8bit e4m3 bf16", 32, 405, 4), "12.7 instructions a value"),
        (decoding(151, [loop(), loop(main=False, membar=8)]), None),
        (decoding(315), None),
        (decoding(316), "316 instructions a step, 6.5 bytes each"),
        (decoding(0), "no loop copies and multiplies"),
        (decoding(151, [loop(membar=1)]), "1 MEMBAR in the loop"),
    ],
)
def test_what_is_wrong_is_named(kernel, words):
    lines = kernel.objections()
    assert len(lines) == (words is not None)
    for line in lines:
        assert words in line and line.startswith(f"{kernel.name} on {kernel.arch}")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lora_grouped_gemm 128x64 bf16 float", 1),
        ("lora_decode bf16 float 8", 1),
        ("lora_grouped_shrink bf16 float element", 18),
        ("lora_wgrad bf16 masked element", 18),
        ("lora_shrink bf16 masked", 0),
        ("lora_gemm 128x64 bf16", 0),
    ],
)
def test_round_trips_that_a_block_waits_for_are_an_error_where_they_are_not_known(name, known):
    for trips in known, known + 1:
        found = kernel(name, [loop(waited=(36, trips))], step=150)
        assert (found.waited_loads, found.round_trips) == (36, trips)
        assert any("plain loads" in line for line in found.objections()) == (trips > known)


STEP = """
.text.kernel:
.L_x_1:
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1+0x10], desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1+0x20], desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*00c0*/                   BRA `(.L_x_2) ;
"""


def test_a_step_is_the_way_round_past_the_copies_that_come_together():
    addresses = sorted(each.address for each in sass_paths.step_of(STEP))
    assert addresses == list(range(0x00, 0x90, 0x10))
    assert sass_paths.step_of(STEP.replace("LDSM", "LDS")) == []


TILE = """
.text.kernel:
        /*0000*/               @P0 BRA `(.L_x_1) ;
        /*0010*/                   STG.E.U16 desc[UR4][R2.64], R0 ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   BRA.DIV UR6, `(.L_x_2) ;
        /*0040*/                   SHFL.IDX PT, R6, R20, R33, 0x1f ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
"""


def test_a_tile_is_the_way_past_the_wide_stores_of_a_whole_warp():
    addresses = [each.address for each in sass_paths.tile_of(TILE)]
    assert addresses == [0x00, 0x30, 0x40, 0x50, 0x60]
    assert sass_paths.tile_of(TILE.replace(".128", "")) == []


def test_memory_barriers_of_a_block_may_stand_around_the_main_loop():
    once_a_job, once_a_step = [loop(), loop(main=False, membar=4)], [loop(membar=1)]
    for name, loops, wrong in [
        ("lora_gemm", once_a_job, True),
        ("lora_gemm", [loop(), loop(main=False, membar=4, wide=0)], False),
        ("lora_gemm", once_a_step, True),
    ]:
        found = sm90a_kernel(loops=loops, kernel=name).objections()
        assert any("MEMBAR" in line for line in found) == wrong, (name, loops)


def test_divisions_of_main_loops_are_counted():
    assert kernel(loops=[loop(divisions=2), loop(main=False, divisions=5)]).divisions == 2


def test_launches_are_those_of_the_kernels():
    if cuda_headers.nvcc() is None:
        pytest.skip("no nvcc found: put a CUDA toolkit's nvcc on PATH or set CUDA_HOME")
    sass.BUILD.mkdir(parents=True, exist_ok=True)
    launches = sass.constants()
    plan = (build.ROOT / "csrc" / "kernels" / "plan" / "problem.h").read_text()
    planned = re.findall(r"\{(\d+), \d+, (\d+), (\d+)\}", plan)
    assert len(planned) == 4
    for batch, shared, resident in planned:
        launch = launches[f"lora_decode_{batch}"]
        assert (launch.shared, launch.resident) == (int(shared), int(resident))
    assert all(launches[name].resident == 0 for name in launches if "decode" not in name)


def test_the_command_line():
    assert sass.architectures([]) == ["sm_80"]
    assert sass.architectures(["sm_90a", "sm_80"]) == ["sm_90a", "sm_80"]
    with pytest.raises(SystemExit):
        sass.architectures(["sm_70"])


def test_a_wait_between_wgmmas_divides_their_group():
    step = [("WARPGROUP", ".ARRIVE"), *[("UIADD3", ""), ("HGMMA", ".64x256x16")] * 4]
    wait = ("WARPGROUP", ".DEPBAR.LE")
    assert sass_kernels.wgmma_groups([*step, wait, *step, wait]) == [4, 4]
    assert sass_kernels.wgmma_groups([*step[:3], wait, *step[3:], wait]) == [1]


def test_blocks_of_an_sm_by_hand():
    # 142 registers: rounded up to 144 a thread, 18,432 a block: three by registers, two by shared
    # memory (2 x 79,872 of 167,936).
    assert kernel().blocks(167936, 166912) == 2
    assert kernel().blocks(102400, 101376) == 1
    assert kernel().blocks(70000, 69000) == 0

"""scripts/sass_main_loops.py: a warp's way through a loop, what is counted, what is recorded."""

import sys

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import sass_loops
import sass_main_loops
import sass_residence
from sass_control import control_named, upper_of
from sass_pipes import CARDS
from sass_steady import steady_path
from sass_step import Ring, op_named

pytestmark = pytest.mark.kernels


def listing(source: str) -> str:
    """As nvdisasm -hex prints it; "# 4w0q1" after an instruction is its control."""
    lines, address = [], 0
    for line in filter(str.strip, source.splitlines()):
        if line.startswith("."):
            lines.append(line)
            continue
        text, _, control = line.strip().partition(" # ")
        upper = upper_of(control_named(control or "1"))
        lines.append(f"        /*{address:04x}*/      {text} ;   /* 0x{0:016x} */")
        lines.append(f"{' ' * 40}/* 0x{upper:016x} */")
        address += 16
    return "\n".join(lines) + "\n"


# A loop that copies where the next tile begins by a way of its own, waits for a stage with a second
# try behind everything, and leaves at its end; a rare way past some of the products is shorter.
LOOP = listing("""
    S2R R0, SR_TID.X
.L_x_0:
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 BRA `(.L_x_1)
    LDGSTS.E.BYPASS.128 [R3], [R6.64]
    BRA `(.L_x_2)
.L_x_1:
    IADD3 R6, R6, R7, RZ
    IADD3 R6, R6, R7, RZ
    LDGSTS.E.BYPASS.128 [R3], [R6.64]
.L_x_2:
    LDSM.16.M88.4 R8, [R2] # 1w0
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5+URZ], R4
    @!P1 BRA `(.L_x_7)
.L_x_3:
    @P2 BRA `(.L_x_4)
    HMMA.16816.F32.BF16 R16, R8, R12, R16 # 2q0
.L_x_4:
    HMMA.16816.F32.BF16 R20, R8, R12, R20 # 8
    ISETP.NE.AND P3, PT, R6, RZ, PT
    @P3 BRA `(.L_x_0)
    EXIT
.L_x_7:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5+URZ], R4
    @!P1 BRA `(.L_x_7)
    BRA `(.L_x_3)
""")


def path_of(text: str) -> list[str]:
    [loop] = sass_loops.main_loops(sass_loops.loops_of(text))
    return [each.opcode for each in steady_path(text, loop)]


def test_the_steady_way_has_all_products_and_no_second_try():
    assert path_of(LOOP) == [
        *("BAR", "BRA", "LDGSTS", "BRA", "LDSM", "SYNCS", "BRA"),
        *("BRA", "HMMA", "HMMA", "ISETP", "BRA"),
    ]


def test_of_two_ways_the_one_that_copies():
    text = LOOP.replace("@P0 BRA `(.L_x_1)", "@P0 BRA `(.L_x_2)")
    assert path_of(text).count("LDGSTS") == 1


def test_a_way_that_loads_to_registers_is_rare_where_others_copy():
    text = LOOP.replace("IADD3 R6, R6, R7, RZ", "LDG.E.64 R6, [R6.64]")
    assert "LDG" not in path_of(text)
    # Without asynchronous copies that is how a loop copies.
    assert path_of(text.replace("LDGSTS.E.BYPASS", "LDS")).count("LDG") == 2


def test_a_way_that_stores_element_by_element_is_rare_where_others_copy():
    text = listing("""
.L_x_0:
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 BRA `(.L_x_1)
    LDGSTS.E.BYPASS.128 [R3], [R6.64]
    LDGSTS.E.BYPASS.128 [R3+0x800], [R6.64+0x800]
    BRA `(.L_x_2)
.L_x_1:
    LDG.E.U16 R4, [R6.64]
    STS.U16 [R3], R4
    STS.U16 [R3+0x2], R4
    STS.U16 [R3+0x4], R4
.L_x_2:
    LDSM.16.M88.4 R8, [R2]
    HMMA.16816.F32.BF16 R16, R8, R12, R16
    @P3 BRA `(.L_x_0)
    EXIT
""")
    way = path_of(text)
    assert (way.count("LDGSTS"), way.count("STS"), way.count("LDG")) == (2, 0, 0)
    # Beside as many copies stores are a step's: those of factors in float, split in halves.
    beside = text.replace("LDGSTS.E.BYPASS.128 [R3]", "NOP [R3]")
    beside = beside.replace("LDG.E.U16 R4", "LDGSTS.E.BYPASS.128 [R4]")
    assert path_of(beside).count("STS") == 3
    # Where stores bring most, 48 bytes a lane to 32, the copies are those of the rare way.
    assert path_of(text.replace("STS.U16", "STS.128")).count("STS") == 3


def test_a_loop_within_is_passed_once():
    text = listing("""
.L_x_0:
    HMMA.16816.F32.BF16 R16, R8, R12, R16
.L_x_1:
    LDG.E.128 R4, [R6.64]
    @P0 BRA `(.L_x_1)
    @P1 BRA `(.L_x_0)
    EXIT
""")
    assert path_of(text) == ["HMMA", "LDG", "BRA", "BRA"]


def test_what_a_main_loop_is_counted_to_hold():
    residence = sass_residence.Residence(threads=256, blocks=1)
    [loop] = sass_main_loops.main_loops_of(LOOP, CARDS["A100"], residence)
    assert loop.instructions == {
        **{"barrier": 2, "branch": 5, "copies": 1, "shared": 1, "tensor": 2, "integer": 1}
    }
    assert loop.warps == 2 and loop.needs["tensor"] == 2 * 2 * 8
    assert loop.needs["issue"] == 2 * 12 and loop.efficiency == pytest.approx(
        32 / loop.cycles, 0.01
    )
    assert loop.cycles > 22 + 29 and loop.bound == "L2"
    alone = sass_residence.Residence(threads=128, blocks=1)
    [once] = sass_main_loops.main_loops_of(LOOP, CARDS["A100"], alone)
    assert once.warps == 1 and once.needs["tensor"] == 16


def residence_of(name, threads, fitting, **more):
    launch = sass_residence.Launch(0, threads, **more)
    return sass_residence.residence_of(name, launch, fitting)


def test_warps_of_an_smsp():
    assert residence_of("lora_gemm 128x64 bf16", 128, 2).warps == 2
    assert residence_of("lora_wgrad bf16", 128, 3).warps == 3
    assert residence_of("lora_gemm_sm90a 128x256 bf16 tail 1", 384, 1, stages=4).warps == 2
    assert residence_of("lora_gemm_sm90a 128x128 pingpong bf16 tail 1", 384, 1, stages=4).warps == 1


def test_no_more_blocks_are_resident_than_the_plan_launches():
    # Of lora_decode an A100 would hold three blocks, an H100 four, but two are launched.
    for fitting in (2, 3, 4):
        assert residence_of("lora_decode bf16 8", 128, fitting, resident=2).blocks == 2
    assert residence_of("lora_decode bf16 64", 256, 2, resident=1).warps == 2
    assert residence_of("lora_decode bf16 8", 128, 1, resident=2).blocks == 1
    assert residence_of("lora_gemm 128x128 bf16", 128, 2).blocks == 2


def test_the_ring_of_a_wgmma_kernel():
    residence = residence_of("lora_gemm_sm90a 128x192 pingpong bf16", 384, 1, stages=4)
    ring = residence.ring([op_named("hgmma:192:last/1")])
    assert ring and ring == Ring(4, 128 * (128 + 96), 128 * 96)
    assert residence.ring([op_named("hmma:2048/1")]) is None


def test_how_far_loads_and_copies_stand_among_products():
    def ops(text):
        return [op_named(word) for word in text.split()]

    ahead, among = sass_main_loops.products_ahead, sass_main_loops.copies_among
    assert ahead(ops("ldsm:4/1w0 hmma:2048/1q0 hmma:2048/1")) == 0
    assert ahead(ops("ldsm:4/1w0 hmma:2048/1 hmma:2048/1q0")) == 1
    # What is loaded at the end of a step is used in the next.
    assert ahead(ops("hmma:2048/1q0 hmma:2048/1 ldsm:4/1w0 hmma:2048/1")) == 1
    assert ahead(ops("ldsm:4/1w0 ldsm:4/1w1 hmma:2048/1q0 hmma:2048/1q1")) == 0.5
    assert among(ops("hmma:2048/1 bar/1 ldgsts:16/1 hmma:2048/1 ldgsts:16/1")) == 0.5
    assert among(ops("bar/1 ldgsts:16/1 hmma:2048/1")) == 0 and among(ops("hmma:2048/1")) == 0

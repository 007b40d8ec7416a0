"""scripts/sass_loops.py: what is a loop in a disassembly, which is a main loop, what it holds."""

import sys

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import sass_kernels
import sass_loops

pytestmark = pytest.mark.kernels

# The consumer of a wgmma kernel: a loop over tiles, in it one over steps, in it the wait for a
# stage, whose second try lies behind everything. `%s`: places where something else may stand.
CONSUMER = """
    BSSY.RECONVERGENT B0, `(.L_x_9)
.L_x_1:
    S2R R0, SR_TID.X
    {tile}
.L_x_2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4
    @!P0 BRA `(.L_x_7)
.L_x_3:
    WARPGROUP.ARRIVE
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    {step}
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3+URZ], RZ
    ISETP.NE.AND P1, PT, R6, RZ, PT
    @P1 BRA `(.L_x_2)
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    {tail}
    UISETP.NE.AND UP0, UPT, UR4, URZ, UPT
    BRA.U UP0, `(.L_x_1)
    {after}
    EXIT
.L_x_7:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4
    {again}
    @!P0 BRA `(.L_x_7)
    BRA `(.L_x_3)
.L_x_9:
    BRA `(.L_x_9)
"""
NOTHING = dict.fromkeys(("tile", "step", "tail", "after", "again"), "NOP")


def listing(source: str, **inserted: str) -> str:
    """The text as nvdisasm prints it, with an address before each instruction."""
    lines, address = [], 0
    for line in source.format(**{**NOTHING, **inserted}).strip("\n").splitlines():
        if line.startswith((".", "$")):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line.strip()} ;")
            address += 16
    return "\n".join(lines) + "\n"


def loops_of(**inserted: str) -> list[sass_kernels.MultiplyingLoop]:
    return sass_kernels.multiplying_loops(listing(CONSUMER, **inserted))


def test_the_loops_of_a_consumer():
    loops = sass_loops.loops_of(listing(CONSUMER))
    # Over tiles, over steps, over tries of the wait; what follows EXIT cannot be reached.
    assert sorted(loop.count("HGMMA") for loop in loops) == [0, 1, 2]
    [main] = sass_loops.main_loops(loops)
    assert main.count("HGMMA") == 1 and main.count("WARPGROUP") == 2
    # The second try is part of it, although it lies behind the whole loop over tiles.
    assert main.count("SYNCS") == 3 and main.count("S2R") == main.count("UISETP") == 0


@pytest.mark.parametrize(
    ("place", "in_main", "in_tiles"),
    [
        ("step", 1, 1),
        ("again", 1, 1),
        ("tile", 0, 1),
        ("tail", 0, 1),
        ("after", 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        ("MEMBAR.ALL.GPU", "membar"),
        ("@P2 MEMBAR.SC.SYS", "membar"),
        ("LDL.64 R2, [R1+0x8]", "local"),
        ("@!UP1 STL [R1], R2", "local"),
        ("MUFU.RCP R7, R8", "divisions"),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64)", "divisions"),
        ("CALL.REL.NOINC `($__internal_1_$__cuda_sm20_rem_s64)", "divisions"),
    ],
)
def test_what_a_loop_holds(place, in_main, in_tiles, instruction, what):
    found = {loop.main: getattr(loop, what) for loop in loops_of(**{place: instruction})}
    assert found == {True: in_main, False: in_tiles}


def test_the_scope_of_a_memory_barrier():
    for instruction, wide in [("CTA", 0), ("GPU", 1), ("SYS", 1)]:
        [main] = [loop for loop in loops_of(step=f"MEMBAR.ALL.{instruction}") if loop.main]
        assert (main.membar, main.wide_membar) == (1, wide)


@pytest.mark.parametrize(
    "instruction", ["MUFU.EX2 R7, R8", "CALL.REL.NOINC `($other)", "LDS R2, [R1]", "ERRBAR"]
)
def test_what_else_it_may_hold(instruction):
    for loop in loops_of(step=instruction):
        assert loop.membar == loop.local == loop.divisions == 0


@pytest.mark.parametrize(
    ("place", "instruction", "waited"),
    [
        ("before", "LD.E.64 R2, [R4.64]", 1),
        ("before", "@P1 LDG.E.U16 R2, desc[UR4][R4.64]", 1),
        ("before", "LDGSTS.E.BYPASS.128 [R1], [R4.64]", 0),
        ("before", "LDS R2, [R4]", 0),
        ("rare", "LDG.E R2, [R4.64]", 1),
        ("after", "LDG.E R2, [R4.64]", 0),
        ("outside", "LDG.E R2, [R4.64]", 0),
    ],
)
def test_loads_between_a_barrier_and_the_next_product(place, instruction, waited):
    places = {**dict.fromkeys(("before", "rare", "after", "outside"), "NOP"), place: instruction}
    text = """
    {outside}
.L_x_1:
    LDGSTS.E.BYPASS.128 [R1], [R4.64]
    BAR.SYNC.DEFER_BLOCKING 0x0
    {before}
    @P2 BRA `(.L_x_3)
.L_x_2:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    {after}
    @P1 BRA `(.L_x_1)
    EXIT
.L_x_3:
    {rare}
    BRA `(.L_x_2)
"""
    [loop] = sass_kernels.multiplying_loops(listing(text.format(**places)))
    assert (loop.waited_loads, loop.counted["tensor"]) == (waited, 1)


# How floats of a factor came to the main loop of lora_grouped_shrink: the first by a generic
# pointer, each in the way of the next, then as they come now.
ONE_BY_ONE = """
    LD.E R24, [R22.64]
    F2FP.BF16.PACK_AB R24, RZ, R24
    STS.U16 [R30], R24
    @P2 BRA `(.L_x_3)
    LD.E R24, [R22.64+0x4]
    F2FP.BF16.PACK_AB R24, RZ, R24
    STS.U16 [R30+0x2], R24
.L_x_3:
    LD.E R24, [R22.64+0x8]
    F2FP.BF16.PACK_AB R24, RZ, R24
    STS.U16 [R30+0x4], R24
"""
TOGETHER = """
    @!P2 BRA `(.L_x_3)
    @P3 LDG.E R24, [R22.64]
    @P4 LDG.E R25, [R22.64+0x4]
    BRA `(.L_x_4)
.L_x_3:
    LDG.E.128 R24, [R22.64]
    LDG.E.128 R28, [R22.64+0x10]
.L_x_4:
    F2FP.BF16.PACK_AB R24, R25, R24
    STS.128 [R30], R24
"""


@pytest.mark.parametrize(
    ("copies", "trips", "loads"),
    [
        (ONE_BY_ONE, 3, 3),
        (TOGETHER, 1, 4),
        (TOGETHER + TOGETHER.replace("L_x_3", "L_x_5").replace("L_x_4", "L_x_6"), 2, 8),
        (TOGETHER.replace("STS.128", "STG.E.128"), 1, 4),
        ("    STS [R30], RZ", 0, 0),
        ("    STS [R30], RZ\n    LDG.E R24, [R22.64]", 1, 1),
    ],
)
def test_round_trips_of_a_way_with_a_loop_on_it(copies, trips, loads):
    text = f"""
.L_x_1:
    BAR.SYNC.DEFER_BLOCKING 0x0
.L_x_2:
{copies.strip(chr(10))}
    @P0 BRA `(.L_x_2)
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    LDG.E R2, [R4.64]
    @P1 BRA `(.L_x_1)
    EXIT
"""
    [loop] = sass_kernels.multiplying_loops(listing(text))
    assert (loop.round_trips, loop.waited_loads) == (trips, loads)


def test_a_jump_back_to_what_it_does_not_always_pass_is_no_loop():
    text = listing("""
    @P0 BRA `(.L_x_1)
.L_x_0:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    EXIT
.L_x_1:
    MEMBAR.ALL.GPU
    BRA `(.L_x_0)
""")
    assert sass_loops.loops_of(text) == []


def test_a_call_of_a_label_is_a_jump_out():
    text = listing("""
.L_x_0:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    CALL.REL.NOINC `($helper)
    @P0 CALL.REL.NOINC `(.L_x_1)
    BRA `(.L_x_0)
.L_x_1:
    MEMBAR.ALL.GPU
    EXIT
$helper:
    RET.REL.NODEC R2 `(.text)
""")
    [loop] = sass_loops.loops_of(text)
    assert loop.place == "0000-0030" and loop.multiplies


def test_a_jump_by_a_table():
    text = listing("""
.L_x_0:
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    BRX R2 -0x20 (*"BRANCH_TARGETS .L_x_1,.L_x_0"*)
    MEMBAR.ALL.GPU
.L_x_1:
    EXIT
""")
    [loop] = sass_loops.loops_of(text)
    assert loop.multiplies and loop.count("MEMBAR") == 0


def test_a_loop_of_one_instruction_and_an_empty_text():
    [loop] = sass_loops.loops_of(listing(".L_x_0:\n    @P0 BRA `(.L_x_0)\n    EXIT"))
    assert loop.place == "0000-0000" and not loop.multiplies
    assert sass_loops.loops_of("") == []

"""scripts/sass_replay.py: cycles of a step that can be counted by hand."""

import sys
from dataclasses import replace

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
from sass_control import Control, control_named, control_of, upper_of
from sass_loops import instructions_of
from sass_pipes import CARDS, TMA_LATENCY, category_of, kind_of, load_latency, read_latency
from sass_replay import replay
from sass_step import Op, Replayed, Ring, op_named

pytestmark = pytest.mark.kernels

# All loads from global memory take the same time.
A100 = replace(CARDS["A100"], dram_latency=CARDS["A100"].l2_latency)
H100 = CARDS["H100"]


def step(text: str, warps=1, blocks=1, card=A100, ring=None) -> Replayed:
    """Of instructions in short: "hmma:2048/1q0" is kind, stall, and the scoreboard it waits for."""
    return replay(tuple(op_named(word) for word in text.split()), warps, card, blocks, ring)


# 16 x 8 x 16 in 8 cycles; loads of four matrices in 4 of the SM's, 16 for four SMSPs, and the first
# is there after 29 and the mean 6 that the other SMSPs' take; integers 2 on their pipe.
@pytest.mark.parametrize(
    ("text", "warps", "cycles", "bound"),
    [
        ("hmma:2048/1 " * 4, 1, 32, "tensor"),
        ("hmma:1024/1 " * 4, 1, 16, "tensor"),
        ("hmma:2048/12 " * 4, 1, 48, "latency"),
        ("hmma:2048/12 " * 4, 2, 64, "tensor"),
        ("hmma:2048/1 " + "other/1 " * 30, 1, 31, "issue"),
        ("hmma:2048/1 " + "other/1 " * 30, 2, 62, "issue"),
        ("hmma:2048/1 " + "int/1 " * 10, 1, 20, "integer"),
        ("hmma:2048/1 " + "int/1 other/1 " * 10, 1, 21, "issue"),
        ("hmma:2048/1 other/15 other/15", 1, 31, "latency"),
        ("ldsm:4/1w0 hmma:2048/1q0", 1, 36, "latency"),
        ("ldsm:2/1w0 hmma:2048/1q0", 1, 29, "latency"),
        ("ldsm:4/1w0 hmma:2048/1 hmma:2048/1q0", 1, 36, "latency"),
        ("ldsm:1/1w0r1 hmma:2048/1 other/1q1", 1, 10, "latency"),
        ("ldsm:4/1 " * 4 + "hmma:2048/1", 1, 64, "shared"),
        ("lds:16/1 " * 4 + "hmma:2048/1", 1, 64, "shared"),
        ("lds:4/1 " * 4 + "hmma:2048/1", 1, 32, "shared"),
        ("bar/1 hmma:2048/1", 1, 23, "latency"),
        ("bar/1 hmma:2048/1", 2, 31, "latency"),
    ],
)
def test_a_step_by_hand(text, warps, cycles, bound):
    done = step(text, warps)
    assert done.cycles == pytest.approx(cycles) and done.bound == bound


def test_blocks_have_barriers_of_their_own():
    # 200 cycles of products each: one block's warp multiplies while the other's waits. Of one, the
    # last product is issued after 49 others, then the barrier, whose latency nothing hides.
    text = "bar/1 " + "hmma:2048/1 " * 25
    assert step(text, 2, blocks=2).cycles == pytest.approx(400)
    assert step(text, 2, blocks=1).cycles == pytest.approx(49 * 8 + 1 + 22)


def test_efficiency_is_the_share_of_the_tensor_pipe():
    done = step("hmma:2048/12 " * 4)
    assert done.tensor == 32 and done.efficiency == pytest.approx(32 / 48)
    assert step("hmma:2048/1", card=CARDS["L40S"]).cycles == pytest.approx(16)


def test_a_full_queue_stops_its_warp_alone():
    # Five loads wait for the port, 16 cycles each; the sixth may not be issued before the first is
    # taken up. A warp that loads nothing goes on.
    loads = "ldsm:4/1 " * 6
    assert step(loads + "hmma:2048/1").cycles == pytest.approx(96)
    first, later = step("ldsm:4/1 " * 5 + "other/1").cycles, step(loads).cycles
    assert (first, later) == (pytest.approx(80), pytest.approx(96))


def test_copies_are_waited_for_by_groups():
    # What has arrived is written in 16 cycles of the port, which the next copy waits for.
    arrives = 261.5 + 4 * 512 / A100.l2_bytes
    one = step("ldgsts:16/1 commit/1w0 depbar:0:0/1 hmma:2048/1").cycles
    assert one == pytest.approx(arrives + 16)
    # With one group left under way, a step waits for the copies of the step before.
    two = step("ldgsts:16/1 commit/1w0 depbar:0:1/1 hmma:2048/1").cycles
    assert two == pytest.approx(one / 2, abs=2)


def test_copies_take_the_way_from_l2():
    done = step("ldgsts:16/1 " * 4 + "commit/1w0 depbar:0:1/1 hmma:2048/1")
    assert done.needs["L2"] == pytest.approx(4 * 4 * 512 / A100.l2_bytes)
    assert done.cycles >= done.needs["L2"]


WGMMA = "arrive/1 hgmma:256:last/1 products:{}/1"


def test_wgmma_runs_beside_its_warp():
    # 64 x 256 x 16 in 128 cycles. With one group under way nothing is waited for but the pipe;
    # waited for at once, its end is 14 later, and two instructions stand before the next.
    assert step(WGMMA.format(1), card=H100).cycles == pytest.approx(128)
    assert step(WGMMA.format(0), card=H100).cycles == pytest.approx(128 + 14 + 2)
    assert step(WGMMA.format(0), 2, card=H100).cycles == pytest.approx(256)


def test_wgmma_reads_shared_memory():
    # 64 x 32 x 16 multiplies for 16 cycles and reads 3 KiB in 24; 64 x 64 x 16 4 KiB in 32 and 32.
    for columns, cycles in ((32, 24), (64, 32), (128, 64)):
        done = step(f"arrive/1 hgmma:{columns}:last/1 products:1/1", 2, card=H100)
        assert done.cycles == pytest.approx(2 * cycles)
    # The same pipe writes stages: 64 cycles of reading, 96 of writing 12 KiB, 64 of products.
    text = "mbarrier:try/1w0 arrive/1q0 hgmma:192:last/1 products:1/1 mbarrier:arrive/1"
    done = step(text, card=H100, ring=Ring(6, 2048, 10240))
    assert done.needs["shared"] == 64 + 96 and done.bound == "shared"
    assert done.cycles == pytest.approx(160, rel=0.02)


def test_no_step_is_shorter_than_its_products():
    # Four wgmmas of 128 cycles; warps that wait in the first steps catch up later.
    text = "mbarrier:try/1w1 arrive/1q1 int/2 hgmma:256/1 " + "int/2 " * 20
    text += "hgmma:256:last/1 products:1/1 mbarrier:arrive/1"
    done = step(text, 2, card=H100, ring=Ring(4, 16384, 8192))
    assert done.cycles == 512 and done.efficiency == 1


def test_a_ring_is_filled_when_all_have_released_a_stage():
    text = "mbarrier:try/1w0 arrive/1q0 hgmma:256:last/1 products:0/1 mbarrier:arrive/1"
    ring = Ring(1, 0)
    # One stage: the next filling begins when the products have ended.
    lone = step(text, card=H100, ring=ring).cycles
    assert lone == pytest.approx(TMA_LATENCY + 29 + 128 + 14 + 3, abs=2)
    deep = step(text, card=H100, ring=Ring(6, 0)).cycles
    assert deep == pytest.approx(128 + 14 + 29 + 4, abs=2)
    slow = step(text, card=H100, ring=Ring(6, 40000)).cycles
    assert slow == pytest.approx(40000 / H100.l2_bytes)


def test_control_words():
    for text in ("4w0r1q25", "15", "1q012345", "2r5", "0w5"):
        control = control_named(text)
        assert control.text == text and control_of(upper_of(control)) == control
    # SHF of a listing: two cycles, waits for scoreboard 1, holds none.
    assert control_of(0x102FE40000011609) == Control(2, None, None, (1,))
    assert control_of(0x000E620000002100) == Control(1, 1, None, ())


LISTING = """
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;      /* 0x0000000002047983b */
                                                                  /* 0x000e620000002100 */
        /*0010*/              @P0  LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R6.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R12, R8 ;
        /*0030*/                   HMMA.1688.F32 R8, R4, R12, R8 ;
        /*0040*/                   HGMMA.64x192x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   DEPBAR.LE SB0, 0x2 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   IMAD.WIDE R2, R3, 0x2, R4 ;
        /*0090*/                   IADD3.X R2, R3, R4, RZ, P0, !PT ;
        /*00a0*/                   LEA R2, R3, R4, 0x4 ;
        /*00b0*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*00c0*/                   BRA `(.L_x_1) ;
        /*00d0*/                   UIADD3 UR4, UR5, 0x1, URZ ;
        /*00e0*/                   LDS.64 R2, [R3] ;
"""


def test_kinds_and_categories():
    instructions, _ = instructions_of(LISTING.replace("0x0000000002047983b", "0x000000000204783b"))
    assert [kind_of(each) for each in instructions] == [
        *("ldsm:4", "ldgsts:16", "hmma:2048", "hmma:1024", "hgmma:192:last", "products:1"),
        *("depbar:0:2", "bar", "imad", "int", "int", "int", "jump", "uniform", "lds:8"),
    ]
    assert [category_of(each) for each in instructions] == [
        *("shared", "copies", "tensor", "tensor", "tensor", "barrier", "barrier", "barrier"),
        *("address", "address", "address", "integer", "branch", "uniform", "shared"),
    ]
    assert instructions[0].control == Control(1, 1, None, ())
    assert instructions[1].control == Control()


def test_an_op_in_short():
    for text in ("hmma:2048/1q0", "ldsm:4/2w0r1", "depbar:0:1/1"):
        assert op_named(text).text == text
    assert op_named("ldsm:4/2w0").name == "ldsm" and op_named("bar/1") == Op("bar", Control(1))


def test_warps_that_wait_for_each_other():
    ring = Ring(1, 0)
    with pytest.raises(RuntimeError, match="wait for each other"):
        step("mbarrier:try/1w0 hgmma:256:last/1q0", card=H100, ring=ring)


def test_a_store_reads_its_operands_the_longer_the_more_there_are():
    assert [read_latency(f"sts:{size}") for size in (4, 8, 16)] == [12, 14, 18]
    assert [read_latency(f"stg:{size}") for size in (4, 8, 16)] == [14, 16, 20]
    assert read_latency("ldsm:4") == read_latency("lds:4") < read_latency("ldg:4")
    assert [load_latency(kind) for kind in ("lds:4", "lds:8", "lds:16")] == [23, 24, 26]
    assert [load_latency(kind) for kind in ("ldsm:1", "ldsm:2", "ldsm:4")] == [23, 25, 29]

"""Which pipe of an SM an instruction takes, for how long, and when its results are there.

An instruction's *kind* is what the replay knows of it: "ldsm:4" loads four matrices, "hmma:2048"
multiplies 16 x 8 x 16. A *card* gives each kind its cycles. Where a figure comes from:

    [1] CUDA C++ Programming Guide, arithmetic instructions: results a clock and SM
    [2] W. Sun et al., Dissecting Tensor Cores via Microbenchmarks, arXiv:2206.02874: mma, ldmatrix
    [3] W. Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture,
        arXiv:2402.13499: L2 and DRAM, of an A100 PCIe, an RTX 4090 and an H800 PCIe; and
        arXiv:2501.12084: wgmma, mma.sync on 9.0
    [4] R. Huerta et al., Analyzing Modern NVIDIA GPU cores, arXiv:2503.20481: issue, memory queues
    [5] L. Zhang et al., A Study of Single and Multi-device Synchronization, arXiv:2004.05371, of
        a V100
    [6] NVIDIA's whitepapers of the A100, Ada and H100: tensor rates
    [7] RRZE-HPC, gpu-benches, gpu-l2-cache: what L2 was measured to send
"""

import re
from dataclasses import dataclass

from sass_loops import Instruction

INTEGER = re.compile(
    r"V?IADD3?|LOP3?|SH[FLR]|ISETP|F?SEL|PRMT|MOV|V?IMNMX3?|IABS|PLOP3|P2R|R2P|BMSK|SGXT|CS2R|VOTEU?"
    r"|ELECT|I2FP|F2FP|FMNMX|FSETP|FCHK|HMNMX2|HSETP?2|I2IP|VABSDIFF4?|LEPC|NOP|LEA"
)
FLOAT = re.compile("[FHD](FMA|ADD|MUL)2?|DSETP")
CONVERT = re.compile("MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV")
JUMP = re.compile("BRA|BRX|JMP|JMX|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|NANOSLEEP")
ARITHMETIC = {"int": INTEGER, "float": FLOAT, "convert": CONVERT, "jump": JUMP}
DEPBAR = re.compile(r"SB(\d)(?:,\s*(0x[0-9a-f]+))?")
MATRICES = re.compile(r"\.(\d)$")
WIDTHS = {"128": 16, "64": 8}


def width_of(instruction: Instruction) -> int:
    """Bytes of a lane that a load or store moves."""
    return next((WIDTHS[each] for each in instruction.suffix.split(".") if each in WIDTHS), 4)


def products_of(suffix: str) -> int:
    """Multiply-adds of ".16816.F32.BF16" or ".1688.F32"."""
    shape = suffix.split(".")[1]
    return 16 * 8 * int(shape[3:])


def kind_of(instruction: Instruction) -> str:
    name, suffix = instruction.opcode, instruction.suffix
    if instruction.never:
        return "other"
    if name == "HMMA":
        return f"hmma:{products_of(suffix)}"
    if name == "HGMMA":
        columns = suffix.split(".")[1].split("x")[1]
        return f"hgmma:{columns}" + (":last" if "gsb0" in instruction.operands else "")
    if name in ("LDSM", "STSM"):
        return f"{name.lower()}:{MATRICES.search(suffix)[1] if MATRICES.search(suffix) else 1}"
    if name in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
        return f"{name.lower()}:{width_of(instruction)}"
    if name == "DEPBAR":  # "SB0, 0x1, {2}": of scoreboard 0 one may be held, of 2 none
        found = DEPBAR.search(instruction.operands)
        return f"depbar:{found[1]}:{int(found[2] or '0', 16)}" if found else "other"
    if name == "WARPGROUP":
        left = instruction.operands.partition(",")[2] or "0x0"
        return f"products:{int(left, 16)}" if "DEPBAR" in suffix else "arrive"
    if name == "SYNCS":
        return "mbarrier:try" if "PHASECHK" in suffix else "mbarrier:arrive"
    if name == "BAR":
        return "bar" if suffix.startswith((".SYNC", ".RED")) else "bar:arrive"
    if name == "MEMBAR":
        return "membar" if ".CTA" in suffix else "membar:wide"
    if name.startswith("UTMA"):
        return "tma"
    for kind, names in ARITHMETIC.items():
        if names.fullmatch(name):
            return kind
    if name == "IMAD":
        return "imad"
    if name == "LDGDEPBAR":
        return "commit"
    if name.startswith("U") or name in ("R2UR", "S2UR"):
        return "uniform"
    return "other"


CATEGORIES = {
    "tensor": ("hmma", "hgmma"),
    "shared": ("ldsm", "stsm", "lds", "sts"),
    "copies": ("ldg", "stg", "ldgsts", "tma"),
    "float": ("float", "convert"),
    "branch": ("jump",),
    "barrier": ("bar", "depbar", "products", "arrive", "mbarrier", "membar", "commit"),
}


def category_of(instruction: Instruction) -> str:
    """As the table of main loops counts it; "address" is arithmetic of 64 bits, and LEA."""
    kind = kind_of(instruction).partition(":")[0]
    for category, kinds in CATEGORIES.items():
        if kind in kinds:
            return category
    if kind == "uniform":
        return "uniform"
    words = instruction.suffix.split(".")
    if instruction.opcode == "LEA" or "WIDE" in words or "X" in words:
        return "address"
    return "integer"


@dataclass(frozen=True)
class Card:
    """What an SM does in a clock. `products`: multiply-adds of a quarter of an SM, its SMSP."""

    name: str
    sms: int
    products: float  # of mma.sync on halves with float32 sums [2, 3, 6]
    float_lanes: int  # of an SMSP [1]
    l2_bytes: float  # that reach an SM, of those that all read at once [7]
    l2_latency: float  # of a load that hits L2 [3]
    dram_latency: float  # of one that does not [3]
    wgmma_products: int = 0


# Tensor rates: on 9.0 mma.sync reaches 490.7 of 756.5 TFLOP/s [3], a GeForce card half of Ada's
# rate where sums are float32 [6]; an RTX PRO 6000 was measured to do 1024 FLOP a clock and SM. L2:
# 5400 GB/s of an A100 at 1.41 GHz, 9700 of an H200 at 1.98, 5200 of an L40 at 2.49; others as the
# nearest of these.
ADA_L2 = 5200 / 2.49 / 142
CARDS = {
    card.name: card
    for card in (
        Card("A100", 108, 256, 16, 5400 / 1.41 / 108, 261.5, 466.3),
        Card("L40S", 142, 128, 32, ADA_L2, 273, 541.5),
        Card("RTX 4090", 128, 64, 32, ADA_L2, 273, 541.5),
        Card("H100", 132, 512 * 490.7 / 756.5, 32, 9700 / 1.98 / 132, 263, 478.8, 512),
        Card("RTX PRO 6000", 188, 128, 32, ADA_L2, 273, 541.5),
    )
}
CARD_OF = {"sm_80": "A100", "sm_90a": "H100"}

SMSPS = 4
SHARED_BYTES = 128  # of an SM's shared memory a clock [1]
INTEGER_CYCLES = 2  # 16 lanes an SMSP, on all cards [1]
CONVERT_CYCLES = 8  # 4 lanes [1]
UNIFORM_CYCLES = 2
QUEUE = 5  # instructions of an SMSP that wait for the memory pipe [4]
LEAST_SHARED_CYCLES = 2  # of the memory pipe an instruction [4]
# Until an instruction has read its operands, by the bytes of a lane that a store takes [4].
READ_LATENCIES = {"ldg": 11, "ldgsts": 13, "lds": 9, "ldsm": 9}
STORE_READ_LATENCIES = {"sts": {4: 12, 8: 14, 16: 18}, "stg": {4: 14, 8: 16, 16: 20}}
OTHER_READ_LATENCY = 11
BARRIER_LATENCY = 22  # from the last arrival on, of one warp [5]
SHUFFLE_LATENCY = 23  # also of LDS and what else goes there [2]
# Three that no source was found for: as of a shuffle, a load, and two of m16n8k8.
CONVERT_LATENCY = 23
MEMBAR_LATENCY = 20
PRODUCT_LATENCY = 33
MBARRIER_LATENCY = 29  # as of shared memory [3]
WGMMA_DRAIN = 14  # m64n8k16 takes 18 cycles, of which 4 on the pipe [3]
# From the instruction to the bytes in shared memory: L2, and an L2 hit's time again to read the
# tensor map and to make addresses (assumed; a ring of two stages or more hides it).
TMA_LATENCY = 2 * 263
GOLDEN = (5**0.5 - 1) / 2  # whose multiples spread evenly


def copy_latency(card: Card, index: int) -> float:
    """Of the n-th load from global memory: spread evenly from L2's to DRAM's."""
    return card.l2_latency + index * GOLDEN % 1 * (card.dram_latency - card.l2_latency)


def shared_cycles(kind: str) -> int:
    """Of the SM's memory pipe, for a warp: without bank conflicts."""
    name, _, size = kind.partition(":")
    lanes = {"ldsm": 4, "stsm": 4}.get(name, 1)  # bytes of a lane and matrix
    bytes_moved = 32 * lanes * int(size) if name in ("ldsm", "stsm") else 32 * int(size or 4)
    return max(LEAST_SHARED_CYCLES, bytes_moved // SHARED_BYTES)


def load_latency(kind: str) -> float:
    """Of a load from shared memory: ldmatrix of 1, 2, 4 takes 23, 25, 29 cycles [2].

    A plain load of 4, 8, 16 bytes takes 23, 24, 26 [2, 4].
    """
    name, _, size = kind.partition(":")
    if name == "ldsm":
        return SHUFFLE_LATENCY + 2 * (int(size or 1) - 1)
    return SHUFFLE_LATENCY + int(size or 4) // 4 - 1


def read_latency(kind: str) -> int:
    """Until an instruction has read its operands, from when its pipe has it."""
    name, _, size = kind.partition(":")
    if name in STORE_READ_LATENCIES:
        return STORE_READ_LATENCIES[name][int(size or 4)]
    return READ_LATENCIES.get(name, OTHER_READ_LATENCY)

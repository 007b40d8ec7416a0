"""The faults of one kernel of 8.0 and of one of 9.0a, which each run of theirs must see."""

from emulated.ptx.faults import Fault, Kernel

# Of clean runs: how many seeds by default, and with --first-seed. Twice as many as a program has
# sizes and variants are each of them on both architectures.
SEEDS = {
    "lora_linear_sequence": (120, 600),
    "lora_grouped_sequence": (112, 300),
    "lora_gemm_sm80": (440, 440),
    "lora_gemm_sm90a": (168, 168),
    "lora_shrink_sm80": (120, 240),
    "lora_wgrad_sm80": (160, 240),
    "lora_dsdb_sm80": (160, 240),
    "lora_decode": (576, 576),
    "lora_grouped_shrink": (720, 720),
    "lora_grouped_gemm": (468, 468),
    "lora_grouped_own_weights": (936, 1872),
    "lora_grouped_own_weights_sm90a": (144, 144),
    "lora_grouped_wgrad": (640, 640),
    "lora_experts": (144, 288),
    "dequantize": (300, 300),
    "dropout": (600, 600),
}
SEEDS_OF_OTHERS = (36, 120)


def clean(program: str, first: int | None = None) -> tuple[str, ...]:
    """The arguments of a program's clean runs: of few seeds, or of many from this one on."""
    few, many = SEEDS.get(program, SEEDS_OF_OTHERS)
    count = few if first is None else many
    begin = first or 1
    return ("--seeds", f"{begin}:{begin + count}")


GEMM_SM80 = Kernel(
    "lora_linear_bf16",
    "80",
    "LoraGemmTileILi128ELi64ELi64ELi32ELi3ELi32EEELb0ELb0E",
    ("lora_linear_sequence", "--variant", "bf16", "--seeds", "1:60"),
)
GEMM_SM90A = Kernel(
    "lora_gemm_sm90a_bf16",
    "90a",
    "LoraGemmSm90aTileILi192ELi4ELNS0_13Sm90aScheduleE1EEELb0ELb0ELi1E",
    ("lora_linear_sequence", "--variant", "bf16", "--seeds", "1:60"),
)
COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\]), 16, %r\d+;"
A_OF_MMA = r"(mma\.sync\S+ \{[^}]*\}, )\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}"
BOX = r"(cp\.async\.bulk\.tensor\.2d\.shared\S+ \[%r\d+\], \[%rd\d+, )\{(%r\d+), (%r\d+)\}"
DESCRIPTORS = r"(wgmma\.mma_async[^}]*\}), (%rd\d+), (%rd\d+)"

SM80 = [
    ("no wait for copies", r"cp\.async\.wait_group 1;", "", 1),
    ("a wait for one group less", r"wait_group 1;", "wait_group 2;", None),
    ("the last wait is for all but one", r"wait_group 0;", "wait_group 1;", 0),
    ("no commit", r"cp\.async\.commit_group;", "", None),
    ("a commit too few", r"cp\.async\.commit_group;", "", 2),
    ("no barrier in the loop", r"bar\.sync\s+0;", "", 1),
    ("no barrier", r"bar\.sync\s+0;", "", None),
    ("lanes do not meet before the store", r"bar\.warp\.sync\s+-1;", "", None),
    ("registers of A swapped", A_OF_MMA, r"\1{\2, \4, \3, \5}", 0),
    ("another type", r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32", 0),
    ("transposed", r"x4\.shared", "x4.trans.shared", 0),
    ("whole chunks past the end", COPY, r"\1, 16, 16;", None),
    ("halves swapped", r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;", 0),
    ("one column too far", r"(st\.global\.u16\s+\[%rd\d+)\+2\]", r"\1+4]", 0),
    ("a chunk of the wrong row", r"(xor\.b32\s+%r\d+, %r\d+), 32;", r"\1, 16;", 0),
    ("the larger limit", r"min\.s32", "max.s32", 0),
    ("a branch the other way", r"@(%p\d+) bra", r"@!\1 bra", 2),
]
SM90A = [
    ("no fence before products", r"wgmma\.fence\.sync\.aligned;", "", None),
    (
        "a wait for one group less",
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 2;",
        0,
    ),
    ("no wait for products", r"wgmma\.wait_group\.sync\.aligned 0;", "", None),
    ("no commit", r"wgmma\.commit_group\.sync\.aligned;", "", None),
    ("operands swapped", DESCRIPTORS, r"\1, \3, \2", 0),
    ("A of the other major", r"p, 1, 1, 0, 0;", "p, 1, 1, 1, 0;", 0),
    ("no accumulation", r"setp\.ne\.b32 p, (%r\d+), 0;", r"setp.eq.b32 p, \1, 0;", 0),
    ("another type", r"f32\.bf16\.bf16", "f32.f16.f16", 0),
    (
        "bytes not expected",
        r"arrive\.expect_tx(\S+) _, (\[%r\d+\]), %r\d+;",
        r"arrive.expect_tx\1 _, \2, 16384;",
        0,
    ),
    ("coordinates swapped", BOX, r"\1{\3, \2}", 0),
    ("no proxy fence before the store", r"fence\.proxy\.async\.shared::cta;", "", None),
    ("no fence of the mbarriers", r"fence\.mbarrier_init\.release\.cluster;", "", 0),
    ("no wait until a store has read", r"cp\.async\.bulk\.wait_group\.read \d;", "", None),
    ("no arrival for the slot", r"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+\];", "", 0),
    ("an arrival too many", r"(mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+\];)", r"\1 \1", 0),
    (
        "transposed",
        r"stmatrix\.sync\.aligned\.m8n8\.x4\.shared",
        "stmatrix.sync.aligned.m8n8.x4.trans.shared",
        0,
    ),
    ("no barrier between store and copy", r"bar\.sync %r\d+, %r\d+;", "", None),
    (
        "the mbarrier of another block",
        r"(mapa\.shared::cluster\.u32 %r\d+, %r\d+), %r\d+;",
        r"\1, 0;",
        None,
    ),
]

FAULTS = [
    *(Fault(f"sm80-{name.replace(' ', '-')}", GEMM_SM80, *edit) for name, *edit in SM80),
    *(Fault(f"sm90a-{name.replace(' ', '-')}", GEMM_SM90A, *edit) for name, *edit in SM90A),
]

# What the clean runs execute of the kernels of both architectures that have code.
LEAST_OF_EACH = 0.8
# Operations that copy, meet, multiply or store. The others are unrolled copies of these, of which
# the sizes take few. 400 are in lora_experts_routes, whose 256 rows never need all of its loops.
MOST_MISSING = 1800

"""Faults of the other kernels, and of what orders blocks and grids: more than one kernel each."""

from emulated.ptx.faults import Fault, Kernel

A_OF_MMA = r"(mma\.sync\S+ \{[^}]*\}, )\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}"
B_OF_MMA = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, )\{(%r\d+), (%r\d+)\}"
COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\]), 16, %r\d+;"
NO_BARRIER = ("no barrier", r"bar\.sync\s+0;", "", None)
NO_WAIT = ("no wait for copies", r"cp\.async\.wait_group \d;", "", None)
LATE_WAIT = ("the last wait is for all but one", r"wait_group 0;", "wait_group 1;", None)
NO_COMMIT = ("no commit", r"cp\.async\.commit_group;", "", None)
WHOLE_CHUNKS = ("whole chunks past the end", COPY, r"\1, 16, 16;", None)
SWAPPED_A = ("registers of A swapped", A_OF_MMA, r"\1{\2, \4, \3, \5}", 0)
SWAPPED_B = ("registers of B swapped", B_OF_MMA, r"\1{\3, \2}", 0)
NOT_TRANSPOSED = ("not transposed", r"x4\.trans\.shared", "x4.shared", None)
TRANSPOSED = ("transposed", r"x4\.shared", "x4.trans.shared", None)
OTHER_WAY = ("a branch the other way", r"@(%p\d+) bra", r"@!\1 bra", 1)

SHIFT = r"(shfl\.sync\.up\S+\s+[^,]*, [^,]*, )%r\d+"
P_ROWS = 248  # the offset of a field of lora_grouped_gemm_own_weights' parameters
# A piece's count; and what a copy reads, or zero.
COUNT = r"ld\.global\.u32\s+(%r\d+), \[%rd\d+\+8\];"
ZERO_FILL = r"selp\.b32\s+(%r\d+), (%r\d+), 0, %p\d+;"


def no_field(name: str, offset: int) -> tuple[str, str, str, None]:
    """Zero for a field of lora_grouped_gemm_own_weights, which is addressed from P_ROWS, too."""
    at = rf"(?:%rd\d+\+{offset - P_ROWS}|\w+_param_0\+{offset})"
    return name, rf"ld\.param\.u64\s+(%rd\d+), \[{at}\];", r"mov.u64 \1, 0;", None


def kernel(unit: str, arch: str, name: str, program: str, variant: str | None = None) -> Kernel:
    chosen = ("--variant", variant) if variant else ()
    return Kernel(unit, arch, name, (program, *chosen, "--seeds", "1:60"))


KERNELS = {
    "shrink": (
        kernel(
            "lora_linear_bf16",
            "80",
            "lora_shrink_sm80I13__nv_bfloat16Lb0E",
            "lora_shrink_sm80",
            "bf16",
        ),
        [NO_BARRIER, NO_WAIT, NO_COMMIT, WHOLE_CHUNKS, SWAPPED_A, TRANSPOSED, OTHER_WAY],
    ),
    "wgrad": (
        kernel(
            "lora_linear_bf16", "90a", "lora_wgrad_sm80I13__nv_bfloat16", "lora_wgrad_sm80", "bf16"
        ),
        [NO_BARRIER, NO_WAIT, NO_COMMIT, WHOLE_CHUNKS, SWAPPED_A, SWAPPED_B, NOT_TRANSPOSED],
    ),
    "dsdb": (
        kernel(
            "lora_linear_bf16",
            "80",
            "lora_dsdb_sm80I13__nv_bfloat16Li16E",
            "lora_dsdb_sm80",
            "bf16_16",
        ),
        [NO_BARRIER, NO_WAIT, NO_COMMIT, WHOLE_CHUNKS, SWAPPED_B, NOT_TRANSPOSED],
    ),
    "grouped-gemm": (
        kernel(
            "lora_grouped_bf16",
            "80",
            "lora_grouped_gemm_sm80I13__nv_bfloat16S2_",
            "lora_grouped_gemm",
            "bf16_deep",
        ),
        [NO_BARRIER, NO_WAIT, NO_COMMIT, SWAPPED_A, TRANSPOSED],
    ),
    "grouped-shrink": (
        kernel(
            "lora_grouped_bf16",
            "80",
            "lora_grouped_shrink_sm80I13__nv_bfloat16S2_Lb0E",
            "lora_grouped_shrink",
            "bf16",
        ),
        [NO_BARRIER, NO_WAIT, SWAPPED_B],
    ),
    "grouped-wgrad": (
        kernel(
            "lora_grouped_bf16",
            "90a",
            "lora_grouped_wgrad_sm80I13__nv_bfloat16S2_",
            "lora_grouped_wgrad",
            "bf16",
        ),
        [NO_BARRIER, NO_COMMIT, NOT_TRANSPOSED],
    ),
    "grouped-scan": (
        kernel("lora_grouped_fp16", "80", "lora_grouped_scanI6__half", "lora_grouped_segments"),
        [
            NO_BARRIER,
            ("lanes shifted by three", SHIFT, r"\g<1>3", 0),
            OTHER_WAY,
        ],
    ),
    "grouped-place": (
        kernel("lora_grouped_fp16", "90a", "lora_grouped_placeI6__half", "lora_grouped_segments"),
        [NO_BARRIER, OTHER_WAY],
    ),
    "dequantize": (
        kernel("dequantize", "80", "dequantize_4bitI13__nv_bfloat16", "dequantize", "bf16"),
        [
            ("the other nibble", r"(shr\.u\d+\s+%rs?\d+, %rs?\d+), 4;", r"\1, 0;", None),
            ("another type", r"cvt\.rn\.bf16", "cvt.rn.f16", None),
            OTHER_WAY,
        ],
    ),
    "dropout": (
        kernel("dropout", "90a", "dropout_kernelI13__nv_bfloat16", "dropout", "bf16"),
        [
            ("a signed product", r"mul\.wide\.u32 product", "mul.wide.s32 product", 0),
            ("kept at the limit", r"setp\.(lt|gt|ge|le)\.u32", r"setp.ne.u32", None),
        ],
    ),
    "decode": (
        kernel(
            "lora_decode_bf16",
            "80",
            "lora_decode_sm80I13__nv_bfloat16S2_Li16E",
            "lora_decode",
            "bf16_16",
        ),
        [
            NO_BARRIER,
            NO_WAIT,
            SWAPPED_A,
            ("no fence before the count", r"fence\.acq_rel\.gpu;", "", 0),
            ("no fence behind the count", r"fence\.acq_rel\.gpu;", "", 1),
            ("fences of the block", r"fence\.acq_rel\.gpu;", "fence.acq_rel.cta;", None),
            ("a count of the block", r"atom\.relaxed\.gpu", "atom.relaxed.cta", None),
            ("a count that stays", r"atom\.global\.exch\.b32 [^;]*;", "", None),
            (
                "no barrier before the count",
                r"bar\.sync\s+0;(?=(?:[^;]*;){0,8}[^;]*fence\.acq_rel)",
                "",
                0,
            ),
        ],
    ),
    "pdl": (
        kernel(
            "lora_gemm_sm90a_bf16",
            "90a",
            "lora_gemm_sm90aI13__nv_bfloat16",
            "lora_linear_sequence",
            "bf16",
        ),
        [
            ("no wait for the grid before", r"griddepcontrol\.wait;", "", None),
            ("no proxy fence behind the wait", r"fence\.proxy\.async\.global;", "", None),
            ("no fence before dependents", r"fence\.acq_rel\.gpu;", "", None),
            (
                "dependents before the wait",
                r"griddepcontrol\.wait;",
                "griddepcontrol.launch_dependents; griddepcontrol.wait;",
                None,
            ),
        ],
    ),
    "pdl-split": (
        kernel(
            "lora_linear_bf16", "90a", "lora_reduceI13__nv_bfloat16", "lora_linear_sequence", "bf16"
        ),
        [("no fence before dependents", r"fence\.acq_rel\.gpu;", "", None)],
    ),
    "pdl-wgrad": (
        kernel(
            "lora_linear_bf16",
            "90a",
            "lora_wgrad_sm80I13__nv_bfloat16",
            "lora_linear_sequence",
            "bf16",
        ),
        [("no wait for the grid before", r"griddepcontrol\.wait;", "", None)],
    ),
    "own-weights": (
        kernel(
            "lora_grouped_bf16",
            "80",
            "own_weights_sm80I13__nv_bfloat16NS0_12LoraGemmTileILi128ELi128ELi64ELi64ELi2ELi64EEELb0ELb0ELb0E",
            "lora_grouped_own_weights",
            "bf16",
        ),
        [
            NO_BARRIER,
            NO_WAIT,
            NO_COMMIT,
            SWAPPED_A,
            no_field("the first W", 192),
            no_field("the first factors", 200),
            no_field("the first bias", 208),
            no_field("rows at the position", P_ROWS),
            no_field("stored at the position", P_ROWS + 8),
            ("rows of the next expert", COUNT, r"mov.u32 \1, 128;", None),
            ("a row less", COUNT, r"\g<0> sub.s32 \1, \1, 1;", None),
            ("rows past the end not zeros", ZERO_FILL, r"mov.u32 \1, \2;", None),
        ],
    ),
    "own-weights-wgmma": (
        kernel(
            "lora_gemm_sm90a_bf16",
            "90a",
            "own_weights_sm90aI13__nv_bfloat16Lb0ELb0ELb0E",
            "lora_grouped_own_weights_sm90a",
            "bf16",
        ),
        [
            NO_WAIT,
            LATE_WAIT,
            NO_COMMIT,
            ("no fence between the proxies", r"fence\.proxy\.async\.shared::cta;", "", None),
            (
                "a warp's rows of one lane",
                r"(shfl\.sync\.idx\S+\s+[^,]*, [^,]*, )%r\d+",
                r"\g<1>0",
                None,
            ),
        ],
    ),
    "experts-weights": (
        kernel(
            "lora_grouped_bf16",
            "80",
            "lora_grouped_reduceI13__nv_bfloat16",
            "lora_grouped_sequence",
            "experts_bf16",
        ),
        [
            (
                "no weight of a row",
                r"mul\.f32\s+(%f\d+), %f\d+, (%f\d+);",
                r"mov.f32 \1, \2;",
                -1,
            )
        ],
    ),
    "experts-gradients": (
        kernel(
            "lora_grouped_bf16",
            "80",
            "lora_grouped_reduce_wgradI13__nv_bfloat16S2_",
            "lora_grouped_sequence",
            "experts_bf16",
        ),
        [
            (
                "ranks side by side",
                r"ld\.param\.u64\s+(%rd\d+), \[%rd\d+\+96\];(?=\s+mul)",
                r"mov.u64 \1, 1;",
                None,
            )
        ],
    ),
    "experts-routes": (
        kernel("experts", "80", "lora_experts_routesIi", "lora_experts"),
        [NO_BARRIER, OTHER_WAY, ("lanes shifted by three", SHIFT, r"\g<1>3", 0)],
    ),
    "experts-place": (
        kernel("experts", "90a", "lora_experts_placeIl", "lora_experts"),
        [NO_BARRIER, OTHER_WAY],
    ),
    "experts-factors": (
        kernel("experts", "80", "lora_experts_factorsI13__nv_bfloat16", "lora_experts", "bf16"),
        [NO_BARRIER, OTHER_WAY, ("lo of hi", r"sub\.f32", "add.f32", None)],
    ),
    "experts-sum": (
        kernel("experts", "90a", "lora_experts_sumI6__half", "lora_experts", "fp16"),
        [
            (*OTHER_WAY[:3], 3),
            ("a slot left out", r"(fma\.rn\.f32\s+(%f\d+), )%f\d+", r"\g<1>0f00000000", -1),
        ],
    ),
    "experts-dot": (
        kernel("experts", "80", "lora_experts_dotI6__half", "lora_experts", "fp16"),
        [
            OTHER_WAY,
            ("a lane of the wrong distance", r"(bfly\S+\s+[^,]*, [^,]*, )%r\d+", r"\g<1>8", 0),
        ],
    ),
}

FAULTS = [
    Fault(f"{group}-{name.replace(' ', '-')}", each, *edit)
    for group, (each, edits) in KERNELS.items()
    for name, *edit in edits
]

"""What stands around the kernels: plans, parameters, their order, and offsets past 2^31.

Seen by the whole op in emulation, by programs whose rows lie far apart, by the package's own tests
(program "package") and by csrc/kernels/launch/ on the emulated runtime (program "cuda").
"""

from emulated.mutants.faults.fault import Fault

PLAN = "tile_choice.cpp"
PARAMS = "sequence/linear_params.h"
SEQUENCE = "sequence/linear_sequence.h"
LAUNCH = "kernel_launch.cpp"
DEEP = ("--size", "fused_shrink_deep")
WIDE = ("--size", "fused_shrink_wide")


def whole_op(name: str, what: str, why: str, file: str, old: str, new: str, size=DEEP) -> Fault:
    return Fault(name, what, why, ((file, old, new),), "lora_linear_sequence", size)


def far_apart(name: str, what: str, program: str, file: str, old: str, new: str) -> Fault:
    return Fault(name, what, "beyond 2^31 it is another", ((file, old, new),), program)


def seen_by(program: str, name: str, what: str, why: str, file: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, ((file, old, new),), program)


HOST = [
    whole_op(
        "fused_shrink_as_dependent",
        "the kernel that makes its own T may begin before the one before it ends",
        "it draws tickets and adds to flags before their clear is visible",
        "gemm/sm90a/launch.h",
        "JobTile<Tile>::kSharedBytes, false};",
        "JobTile<Tile>::kSharedBytes, true};",
    ),
    whole_op(
        "row_blocks_not_in_pairs",
        "flags for the row blocks that there are, not for pairs of them",
        "the empty block of an odd last pair is published, too",
        PLAN,
        "row_blocks = 2 * blocks_of(p.m, 2 * tile.rows);",
        "row_blocks = blocks_of(p.m, tile.rows);",
    ),
    whole_op(
        "flags_over_partial_sums",
        "the flags lie where dA's partial sums do",
        "a wgrad launched with PDL overwrites what it waits for",
        PARAMS,
        "return at<uint32_t>(plan_.fused_shrink->flags);",
        "return at<uint32_t>(plan_.g_a != plan::kNone ? plan_.g_a : plan_.fused_shrink->flags);",
    ),
    whole_op(
        "ready_flags_not_cleared",
        "only the ticket and the parts are cleared",
        "in a used workspace T is read before it is written",
        SEQUENCE,
        "launch_.clear(params_.flags(), plan_.fused_shrink->flag_count());",
        "launch_.clear(params_.flags(), 2 * plan::kFlagsApart);",
    ),
    whole_op(
        "written_is_ticket",
        "the parts of T are counted in the word of the ticket",
        "jobs are passed over, and tickets count as parts of dS",
        PARAMS,
        "return flags() + plan::kFlagsApart;",
        "return flags();",
        WIDE,
    ),
    whole_op(
        "fused_shrink_up_to_rank_128",
        "ranks up to 128 make T in the same grid",
        "the kernel makes one step of 64 columns of T",
        PLAN,
        "p.rank <= kMaxFusedShrinkRank",
        "p.rank <= 128",
    ),
    whole_op(
        "parts_without_halves",
        "as many parts are awaited as there are row blocks",
        "each has two",
        PARAMS,
        "product.parts = parts_of_t(plan_.fused_shrink->row_blocks);",
        "product.parts = static_cast<uint32_t>(plan_.fused_shrink->row_blocks);",
    ),
    whole_op(
        "factor_of_a_backward",
        "backward makes dS of A's halves",
        "dS = dY B",
        PARAMS,
        "return {b_halves().hi, b_halves().pitch};",
        "return {a_halves().hi, b_halves().pitch};",
    ),
    whole_op(
        "s_not_stored_fused_shrink",
        "the forward kernel that makes its own T stores no S",
        "backward reads it",
        SEQUENCE,
        "params_.fused_shrink(f.s)",
        "params_.fused_shrink(nullptr)",
    ),
    whole_op(
        "flags_not_cleared",
        "no flag is cleared",
        "a workspace comes as the allocator has it",
        SEQUENCE,
        "    launch_.clear(params_.flags(), plan_.fused_shrink->flag_count());\n",
        "",
    ),
    whole_op(
        "fused_shrink_without_scaling",
        "T is not scaled where the product makes it",
        "Y and dX lack the scaling",
        PARAMS,
        "in.scaling = o_.scaling",
        "in.scaling = 1.f",
    ),
    far_apart(
        "split_source_in_int",
        "the offset into the matrix to split is an int",
        "lora_split",
        "skinny/elementwise.h",
        "row * matrix.row_stride + column * matrix.column_stride",
        "static_cast<int>(row * matrix.row_stride + column * matrix.column_stride)",
    ),
    seen_by(
        "package",
        "backward_without_aligned_dx",
        "backward takes whole chunks whatever the width of dX is",
        "rows of dX begin in the middle of a chunk",
        LAUNCH,
        "aligned(args.grad) && aligned(args.x) && aligned_rows(problem.k, problem.dtype)",
        "aligned(args.grad) && aligned(args.x)",
    ),
    seen_by(
        "package",
        "aligned_without_the_pointer",
        "a tensor counts as aligned by its pitch alone",
        "a slice of columns begins in the middle of a chunk",
        "launch_parts.cpp",
        "pitch >= tensor.size(1) &&\n         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunk == 0",
        "pitch >= tensor.size(1)",
    ),
    seen_by(
        "package",
        "aligned_b_of_a",
        "lora_b counts as aligned if lora_a is",
        "a slice of lora_b is not",
        LAUNCH,
        "problem.aligned_b = aligned(update.b())",
        "problem.aligned_b = aligned(update.a())",
    ),
    seen_by(
        "cuda",
        "every_kernel_begins_early",
        "all launches have the attribute of programmatic dependents",
        "kernels that do not wait read what is not there",
        "kernels/launch/stream_launch.h",
        "launch.numAttrs = use_pdl ? 1 : 0;",
        "launch.numAttrs = 1;",
    ),
    seen_by(
        "cuda",
        "clear_counts_bytes",
        "a quarter of the flags is cleared",
        "cudaMemsetAsync counts bytes",
        "kernels/launch/stream_launch.h",
        "static_cast<size_t>(count) * sizeof *flags",
        "static_cast<size_t>(count)",
    ),
    seen_by(
        "cuda",
        "pitch_of_the_width",
        "a tensor map's pitch is its width",
        "rows may lie apart",
        "kernels/launch/stream_launch.h",
        "rows, columns, pitch, box_rows}",
        "rows, columns, columns, box_rows}",
    ),
    seen_by(
        "cuda",
        "first_group_of_eight",
        "the first group of a row's draws is col_offset / 8",
        "groups own columns of a run of 32",
        "kernels/launch/dropout.cu",
        "first_group = params.col_offset / 32 * 4",
        "first_group = params.col_offset / 8",
    ),
    seen_by(
        "cuda",
        "every_cluster_begins_early",
        "all launches in clusters have the attribute of programmatic dependents",
        "the kernel that makes its own T must not begin before its flags are clear",
        "kernels/launch/stream_launch.h",
        "launch.numAttrs = config.dependent ? 2 : 1;",
        "launch.numAttrs = 2;",
    ),
]

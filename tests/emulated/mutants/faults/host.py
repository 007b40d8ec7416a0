"""What stands around the kernels: plans, parameters, their order, and offsets past 2^31.

Seen by the whole op in emulation, by programs whose rows lie far apart, by the package's own tests
(program "package") and by csrc/kernels/launch/ on the emulated runtime (program "cuda").
"""

from emulated.mutants.faults.fault import Fault

PARAMS = "sequence/linear_params.h"
LAUNCH = "kernel_launch.cpp"


def whole_op(name: str, what: str, why: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, ((PARAMS, old, new),), "lora_linear_sequence")


def far_apart(name: str, what: str, program: str, file: str, old: str, new: str) -> Fault:
    return Fault(name, what, "beyond 2^31 it is another", ((file, old, new),), program)


def seen_by(program: str, name: str, what: str, why: str, file: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, ((file, old, new),), program)


HOST = [
    whole_op(
        "factor_of_a_backward",
        "backward makes dS of A's halves",
        "dS = dY B",
        "shrink_of(g.dy, g.dy_pitch, o_.n, b_halves())",
        "shrink_of(g.dy, g.dy_pitch, o_.n, a_halves())",
    ),
    whole_op(
        "t_without_scaling",
        "T is not scaled",
        "Y and dX lack the scaling",
        "params.scaling = o_.scaling",
        "params.scaling = 1.f",
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
        "the experts' product waits for nothing, and reads what the kernel before it makes",
        "kernels/launch/stream_launch.h",
        "launch.numAttrs = config.dependent ? 2 : 1;",
        "launch.numAttrs = 2;",
    ),
]

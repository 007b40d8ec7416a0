"""Tensor maps that do not fit the arrays or the kernel's boxes."""

from emulator.hostile.faults.fault import Fault

MAPS = [
    Fault(
        "w_box_of_a_whole_tile",
        "the boxes of W have 128 rows, those of half a tile should have 64",
        "twice the announced bytes come, over the half beside and the stage behind",
        [
            (
                "tensor_map(w, problem.w.rows, problem.w.columns, problem.w.pitch, 64)",
                "tensor_map(w, problem.w.rows, problem.w.columns, problem.w.pitch, 128)",
            )
        ],
    ),
    Fault(
        "y_box_of_a_whole_tile",
        "the boxes of Y have 128 rows, a slab has 64",
        "the store reads the slab behind as well, and writes the other warpgroup's rows",
        [("tensor_map(y, m, n, y_pitch, 64)", "tensor_map(y, m, n, y_pitch, 128)")],
    ),
    Fault(
        "y_columns_of_the_pitch",
        "Y's map is as wide as its pitch",
        "columns between the rows, which belong to others, are overwritten",
        [("tensor_map(y, m, n, y_pitch, 64)", "tensor_map(y, m, y_pitch, y_pitch, 64)")],
    ),
    Fault(
        "x_columns_of_the_pitch",
        "X's map is as wide as its pitch",
        "what lies between the rows is multiplied, where zeros were to be filled in",
        [
            (
                "tensor_map(x, m, k, problem.x.pitch, kBlockM)",
                "tensor_map(x, m, problem.x.pitch, problem.x.pitch, kBlockM)",
            )
        ],
    ),
    Fault(
        "x_rows_rounded_up",
        "X's map has as many rows as the row blocks cover",
        "rows past the end of the array are read",
        [
            (
                "tensor_map(x, m, k, problem.x.pitch, kBlockM)",
                "tensor_map(x, 2 * kBlockM * jobs.row_pairs, k, problem.x.pitch, kBlockM)",
            )
        ],
    ),
]

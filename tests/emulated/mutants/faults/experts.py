"""Rows of experts: what is another expert's, another row's, or no expert's."""

from emulated.mutants.faults.fault import faults_of

of_gemm = faults_of("grouped/own_weights.h")

EXPERTS = [
    of_gemm(
        "experts_first_weight",
        "every tile takes the first expert's W",
        "its rows have another expert",
        ("p.q + span.adapter * o.q_stride", "p.q"),
    ),
    of_gemm(
        "experts_first_factors",
        "every tile takes the first expert's U",
        "its rows have another expert",
        ("p.low_rank[0].u + span.adapter * o.u_stride", "p.low_rank[0].u"),
    ),
    of_gemm(
        "experts_first_bias",
        "every tile adds the first expert's bias",
        "its rows have another expert",
        ("span.adapter * o.bias_stride * bytes", "0 * bytes"),
    ),
    of_gemm(
        "experts_bias_in_halves",
        "the bias of an expert is looked for as if it were in halves",
        "floats take twice as much",
        ("p.float_bias ? sizeof(float) : sizeof(T)", "sizeof(T)"),
    ),
    of_gemm(
        "experts_weight_of_the_tile",
        "a tile's number is taken for its expert's",
        "an expert has several tiles, and another none",
        (
            "return {piece.adapter, piece.begin, piece.count};",
            "return {piece.adapter < 0 ? -1 : row / LoraGroupedTables::kRowTileRows, piece.begin, piece.count};",
        ),
    ),
    of_gemm(
        "experts_rows_not_gathered",
        "P is read by position",
        "a token has rows of several experts",
        ("rows{o.p_rows, p.m};", "rows{nullptr, p.m};"),
    ),
    of_gemm(
        "experts_gathered_by_element_alone_by_position",
        "rows of P at odd addresses are read by position",
        "they are gathered as others are",
        ("? rows(span.begin + row) : INT_MAX", "? span.begin + row : INT_MAX"),
    ),
    of_gemm(
        "experts_stored_where_x_is",
        "a row of Y is stored where P has it",
        "several positions have one row of P",
        ("{o.y_rows, p.m}", "{o.p_rows, p.m}"),
    ),
    of_gemm(
        "experts_mask_by_y",
        "the mask is drawn for the row of Y",
        "forward has drawn it for the row of X",
        ("{o.mask_rows, p.m}", "{o.y_rows, p.m}"),
    ),
    of_gemm(
        "experts_tile_over_two_segments",
        "a tile's rows end where all rows end",
        "the rows that follow are the next expert's",
        ("span.begin + span.count, bias_of", "p.m, bias_of"),
    ),
    of_gemm(
        "experts_bias_of_no_expert",
        "rows without an expert get the bias before the first",
        "they are zeros",
        ("p.bias == nullptr || !span.of_expert()", "p.bias == nullptr"),
    ),
    of_gemm(
        "experts_lo_beside_hi_in_both",
        "the first term is lo lo",
        "that is below float's rounding, and lo hi is missing",
        (
            "return {depth - term * o.width, term == 0, term == 1};",
            "return {depth - term * o.width, term == 0, term != 2};",
        ),
    ),
    of_gemm(
        "experts_lo_at_the_rank",
        "the last term begins behind twice the rank",
        "T and U have zeros up to the width",
        ("? 2 * o.width : 0) + p.rank;", "? 2 * p.rank : 0) + p.rank;"),
    ),
    of_gemm(
        "experts_lo_never_scaled",
        "the terms with lo are not scaled back",
        "float16's lo is stored 2048 times as large",
        ("if (k0 + k16 * 16 == 2 * o.width)", "if (k0 + k16 * 16 == 3 * o.width)"),
    ),
    of_gemm(
        "experts_bound_in_m",
        "rows of T end where all rows end",
        "those of the next expert are read for nothing",
        ("p.t_pitch, span.begin + span.count, of_t + left}", "p.t_pitch, p.m, of_t + left}"),
    ),
]

"""Rows of experts: what is another expert's, another row's, or no expert's."""

from emulated.mutants.faults.fault import Fault, faults_of
from emulated.mutants.faults.grouped import of_op

of_gemm = faults_of("grouped/own_weights.h")
of_wgmma = faults_of("grouped/own_weights_sm90a.h")
of_params = of_op("sequence/grouped_params.h", "--variant", "experts_float_bf16")
of_sequence = of_op("sequence/grouped_sequence.h", "--variant", "experts_float_bf16")
of_plan = of_op("tile_choice.cpp", "--variant", "experts_bf16")

EXPERTS = [
    of_gemm(
        "experts_first_weight",
        "every tile takes the first expert's W",
        "its rows have another expert",
        ("p.q + (span.weight - o.first_expert) * o.q_stride", "p.q"),
    ),
    of_gemm(
        "experts_slice_from_the_first",
        "the W of a slice are taken for those of the first experts",
        "its first has another number",
        ("(span.weight - o.first_expert) * o.q_stride", "span.weight * o.q_stride"),
    ),
    of_gemm(
        "experts_slice_and_one",
        "a slice has the rows of the expert behind it, too",
        "its W is not there",
        ("(o.end_expert - o.first_expert)", "(o.end_expert - o.first_expert + 1)"),
    ),
    of_gemm(
        "experts_slice_and_those_before",
        "a slice has the rows of the experts before it, too",
        "their W are not there",
        (
            "from_first < static_cast<unsigned>(o.end_expert - o.first_expert)",
            "expert < o.end_expert",
        ),
    ),
    of_gemm(
        "experts_slice_with_rows_of_no_expert",
        "each slice writes the rows of no expert",
        "they are the first one's to write",
        (
            "const int expert = max(piece.slot, 0);",
            "const int expert = piece.slot < 0 ? o.first_expert : piece.slot;",
        ),
    ),
    of_gemm(
        "experts_weight_of_group",
        "a tile's W is that of its group's number",
        "an expert with several adapters has several groups",
        ("return {piece.slot, piece.begin,", "return {piece.adapter, piece.begin,"),
    ),
    of_gemm(
        "experts_first_factors",
        "every tile takes the first expert's U",
        "its rows have another expert",
        (
            "p.low_rank[0].u + o.row_tiles[loads.cursor.tile].adapter * o.u_stride",
            "p.low_rank[0].u",
        ),
    ),
    of_gemm(
        "experts_first_bias",
        "every tile adds the first expert's bias",
        "its rows have another expert",
        ("span.weight * o.bias_stride * bytes", "0 * bytes"),
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
            "return {piece.slot, piece.begin, is_here ? piece.count : 0};",
            "return {piece.slot < 0 ? -1 : cursor.tile, piece.begin, is_here ? piece.count : 0};",
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
        ("p.bias == nullptr || !span.has_products()", "p.bias == nullptr"),
    ),
    of_gemm(
        "experts_lo_beside_hi_in_both",
        "the first term is lo lo",
        "that is below float's rounding, and lo hi is missing",
        (
            "return {depth - before, term == 0, term == 1};",
            "return {depth - before, term == 0, term != 2};",
        ),
    ),
    of_gemm(
        "experts_lo_at_the_rank",
        "the last term begins behind twice the rank",
        "T and U have zeros up to the width",
        ("? last_term() : 0) + p.rank;", "? 2 * p.rank : 0) + p.rank;"),
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
    of_wgmma(
        "experts_wgmma_first_weight",
        "Q's box is that of the first expert",
        "the tile's rows have another one",
        ("(work.span.weight - o.first_expert) * o.q_rows", "0 * o.q_rows"),
    ),
    of_wgmma(
        "experts_wgmma_slice_from_the_first",
        "the W of a slice are taken for those of the first experts",
        "its first has another number",
        ("(work.span.weight - o.first_expert) * o.q_rows", "work.span.weight * o.q_rows"),
    ),
    of_wgmma(
        "experts_wgmma_first_bias",
        "every tile adds the first expert's bias",
        "its rows have another expert",
        ("work.span.weight * shared.adapters.o.bias_stride", "0 * shared.adapters.o.bias_stride"),
    ),
    of_wgmma(
        "experts_wgmma_row_of_another_lane",
        "a thread's rows of P are those of the lane beside",
        "four rows of a warp are a row apart, eight lanes each",
        ("row, i * 4 + lane / 8)", "row, i * 4 + lane % 4)"),
    ),
    of_wgmma(
        "experts_wgmma_tile_over_two_segments",
        "all rows of a tile are stored",
        "those past the piece's end are the next expert's",
        ("rows.count = work.span.count - first;", "rows.count = Tile::kM - first;"),
    ),
    of_wgmma(
        "experts_wgmma_last_step_into_the_next",
        "the last step of an MN-major Q begins where others do",
        "the next expert's rows are behind, and zeros times NaN are NaN",
        ("kMNMajor ? min(k0, p.k - Tile::kK) : k0", "k0"),
    ),
    of_wgmma(
        "experts_wgmma_step_begun_before_doubled",
        "what the last step has in common with the one before is multiplied twice",
        "P has zeros there",
        ("column < k0 ? 0 : min", "column < 0 ? 0 : min"),
    ),
    of_wgmma(
        "experts_wgmma_fence_after_the_arrival",
        "the fence between the proxies follows the arrival",
        "wgmma may read before what the copies wrote is visible to it",
        (
            "    ptx::fence_proxy_async_shared();\n    __syncwarp();\n",
            "    __syncwarp();\n",
        ),
        (
            "ptx::mbarrier_arrive_remote(shared.block.full(slot), 0);",
            "ptx::mbarrier_arrive_remote(shared.block.full(slot), 0); ptx::fence_proxy_async_shared();",
        ),
    ),
    Fault(
        "experts_wgmma_mask_of_the_tile_before",
        "bits are drawn for the tile that is multiplied",
        "those drawn meanwhile are the next one's",
        (
            (
                "grouped/own_weights_sm90a.h",
                "      draw_for(ahead, then);\n      consumer",
                "      draw_for(ahead, work);\n      consumer",
            ),
        ),
        "lora_grouped_own_weights_sm90a",
        ("--variant", "dx_masked"),
    ),
    of_params(
        "experts_weights_a_row_apart",
        "an expert's W begins a row after the one before",
        "it has as many rows as there are features",
        ("params.q_stride = o_.weight_stride", "params.q_stride = o_.weight_pitch"),
    ),
    of_params(
        "experts_wgmma_matrices_without_a_gap",
        "an expert's W begins where the features of the one before end",
        "the stack may have rows between them",
        ("o_.weight_stride / std::max<int64_t>(1, o_.weight_pitch)", "o_.n"),
    ),
    of_params(
        "experts_biases_in_one",
        "all experts have the first one's bias",
        "each has its own",
        (
            "params.bias_stride = o_.bias_stride, params.p_rows",
            "params.bias_stride = 0, params.p_rows",
        ),
    ),
    of_params(
        "experts_dy_where_x_is",
        "dX reads a row of dY where X has it",
        "one is by token and the other by position",
        ("params.p_rows = o_.places.dy", "params.p_rows = o_.places.x"),
    ),
    of_params(
        "experts_mask_where_dy_is",
        "dX's mask is that of the row of dY",
        "forward has drawn it for the row of X",
        ("params.mask_rows = o_.places.mask", "params.mask_rows = o_.places.dy"),
    ),
    of_params(
        "experts_hi_alone",
        "of factors in floats hi is multiplied alone",
        "lo is lost",
        ("params.gemm.terms = plan_.terms == 2 ? 3 : 1;", "params.gemm.terms = 1;"),
    ),
    of_params(
        "experts_slice_of_all",
        "a slice's last expert is that of all",
        "the W of those behind it are not there",
        ("params.end_expert = o_.end_weight", "params.end_expert = o_.rows.groups"),
    ),
    of_sequence(
        "experts_slice_shrinks_again",
        "further slices make the tables again, and no dX",
        "its slices alone have dX",
        ("if (o_.goes_on()) return dx(g);", "if (o_.goes_on()) return segments();"),
    ),
    of_sequence(
        "experts_of_many_adapters",
        "dX of experts is that of many adapters",
        "all take the first expert's W",
        (
            "plan_.tables->own_weights() ? own_weights<true, kMasked>(params_.own_weights(g))",
            "false ? own_weights<true, kMasked>(params_.own_weights(g))",
        ),
    ),
    of_plan(
        "experts_tiles_as_of_all_rows",
        "there are row tiles for all rows one below the other",
        "each expert begins a new one",
        (
            "static_cast<int>(Tables::pieces_of(m, groups, kGroupedRowTileRows))",
            "static_cast<int>(blocks_of(m, kGroupedRowTileRows))",
        ),
    ),
    of_params(
        "experts_da_without_weights_of_rows",
        "dA's sum has dS without the weights of rows",
        "they are part of the gradient",
        (
            "g.row_weights.of != nullptr ? plan_.weighted_t : plan_.t",
            "false ? plan_.weighted_t : plan_.t",
        ),
    ),
    of_params(
        "experts_db_without_weights_of_rows",
        "dB's sum has s S without the weights of rows",
        "they are part of the gradient",
        (
            "      next->row_weights = g.row_weights;",
            "      next->row_weights = g.row_weights, next->row_weights.of = nullptr;",
        ),
    ),
    of_params(
        "experts_ds_of_rows_of_x",
        "dS is made of the rows of dY that X has",
        "each has its own",
        (
            "shrink_of(g.dy, g.dy_pitch, o_.n, places().dy)",
            "shrink_of(g.dy, g.dy_pitch, o_.n, places().x)",
        ),
    ),
    of_params(
        "experts_da_of_rows_of_dy",
        "dA is summed over the rows of X that dY has",
        "each has its own",
        ("o_.x_pitch, places().x, weighted_t(g)", "o_.x_pitch, places().dy, weighted_t(g)"),
    ),
    of_params(
        "experts_db_of_rows_of_x",
        "dB is summed over the rows of dY that X has",
        "each has its own",
        ("g.dy_pitch, places().dy, plan_.s", "g.dy_pitch, places().x, plan_.s"),
    ),
    of_params(
        "experts_tables_of_the_workspace",
        "tables that are given are looked for in the workspace",
        "nobody writes them there",
        ("operands.tables != nullptr ? operands.tables : operands.workspace", "operands.workspace"),
    ),
    of_params(
        "experts_t_of_the_workspace",
        "a T that is given is looked for in the workspace",
        "nobody writes it there",
        ("o_.t != nullptr ? static_cast<const T*>(o_.t) : at<T>(plan_.t)", "at<T>(plan_.t)"),
    ),
    of_params(
        "experts_one_term_of_a_pool",
        "of a pool in halves hi alone is read",
        "float32's has lo beside it",
        ("params.terms = plan_.terms, params.steps", "params.terms = 1, params.steps"),
    ),
    of_sequence(
        "experts_factors_in_floats",
        "a pool in halves is read as floats",
        "its factors were split before",
        ("? shrink_by<T, kMNMajor>", "? shrink_by<F, kMNMajor>"),
    ),
]

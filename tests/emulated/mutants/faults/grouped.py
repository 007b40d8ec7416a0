"""Plans, parameters and the sequence of many adapters, and what the rules cannot know of its kernels."""

from emulated.mutants.faults.fault import Fault, faults_of

PROGRAM = "lora_grouped_sequence"
of_gemm = faults_of("grouped/gemm.h")
of_scan = faults_of("grouped/segments.h")
of_shrink = faults_of("grouped/shrink.h")
of_wgrad = faults_of("grouped/wgrad.h")


def of_op(file: str, *arguments: str):
    """Makes faults that the whole op alone can see."""

    def fault(name: str, what: str, why: str, *edits: tuple[str, str]) -> Fault:
        changed = tuple((file, old, new) for old, new in edits)
        return Fault(name, what, why, changed, PROGRAM, arguments)

    return fault


LONG = ("--size", "long")  # segments of several pieces
of_params = of_op("sequence/grouped_params.h")
of_sequence = of_op("sequence/grouped_sequence.h")
of_many_entries = of_op("sequence/grouped_sequence.h", "--size", "many")
of_plan = of_op("tile_choice.cpp", *LONG)
of_tables = of_op("tile_choice.cpp")
of_counts = of_op("workspace.cpp", "--size", "many")
of_partial_sums = of_op("sequence/grouped_params.h", *LONG)

GROUPED = [
    of_params(
        "grouped_s_without_keep_scale",
        "S is not scaled by 1 / (1 - p)",
        "drop(X) has no scale of its own: it is S that gets it",
        (
            "params.of[0].s = f.s, params.of[0].keep_scale = o_.mask.keep_scale;",
            "params.of[0].s = f.s;",
        ),
    ),
    of_params(
        "grouped_ds_from_saved_scale",
        "the scaled S is made where dS lies",
        "dB's sums and dA's take different columns",
        (
            "*next = reduced_to(plan_.s), next->saved = g.s;",
            "*next = reduced_to(plan_.t), next->saved = g.s;",
        ),
    ),
    of_partial_sums(
        "grouped_partial_sums_without_keep_scale",
        "partial sums of dA are added without 1 / (1 - p)",
        "sums of one piece are scaled where they are made",
        ("o_.mask.keep_scale};", "1.f};"),
    ),
    of_counts(
        "grouped_counts_without_those_of_no_adapter",
        "the workspace has no counts of rows without an adapter",
        "they are written before dX begins",
        ("kGroupedChunk) * (groups.count + 1), 4);", "kGroupedChunk) * groups.count, 4);"),
    ),
    of_params(
        "grouped_wgrad_never_masked",
        "dA takes X as it lies",
        "it was dropped",
        ("params.product[0].masked = o_.dropout;", "params.product[0].masked = false;"),
    ),
    of_params(
        "grouped_gradients_of_entries_of_factors",
        "gradients of a list go where the factors lie",
        "the factors are overwritten",
        (
            "with_ranks(g.gradients.pool, gradient_entries())",
            "with_ranks(g.gradients.pool, entries())",
        ),
    ),
    of_params(
        "grouped_lo_beside_rank",
        "T's lo begins behind hi's own rank",
        "the width is whole chunks, and every kernel reads it there",
        (
            "params.lo_column = plan_.width, params.mask",
            "params.lo_column = o_.rows.max_rank, params.mask",
        ),
    ),
    of_many_entries(
        "grouped_entries_of_the_first_launch_again",
        "each launch writes the first entries of the list",
        "adapters past those are not their own",
        (
            "lists.begin()[(first + i) / groups][(first + i) % groups]",
            "lists.begin()[i / groups][i % groups]",
        ),
    ),
    of_sequence(
        "grouped_gradients_in_the_table_of_factors",
        "the table of gradients has the factors again",
        "gradients would overwrite the factors",
        ("{o_.factors.list, g.gradients.list}", "{o_.factors.list, o_.factors.list}"),
    ),
    of_params(
        "grouped_ranks_of_the_pool",
        "the kernels read the ranks that a pool was given",
        "it may have none, and then the tables' are the largest",
        ("pool.entries = entries, pool.ranks = tables_.ranks;", "pool.entries = entries;"),
    ),
    of_sequence(
        "grouped_place_before_scan",
        "rows are placed before the scan",
        "the counts do not say yet where a chunk begins",
        (
            "    run(lora_grouped_scan<T>, dim3(1));\n    if (o_.rows.index != nullptr) run(lora_grouped_place<T>, chunks);\n",
            "    if (o_.rows.index != nullptr) run(lora_grouped_place<T>, chunks);\n    run(lora_grouped_scan<T>, dim3(1));\n",
        ),
    ),
    of_sequence(
        "grouped_tiles_without_adapters",
        "the grid of the reduce has a tile for each 64 rows",
        "a tile has rows of one adapter, so that there may be one more for each",
        (
            "dim3(static_cast<unsigned>(plan_.tables->tile_count), params.count())",
            "dim3(blocks_of(o_.m, 64), params.count())",
        ),
    ),
    of_tables(
        "grouped_pieces_without_adapters",
        "there is a piece for each so many rows",
        "a piece has rows of one adapter, so that there may be one more for each",
        (
            "static_cast<int>(Tables::pieces_of(m, groups, rows))",
            "static_cast<int>(blocks_of(m, rows))",
        ),
    ),
    of_plan(
        "grouped_half_of_the_slots",
        "partial sums have a slot for each whole piece of rows",
        "a segment a little longer than a piece has two",
        (
            "static_cast<int>(Tables::slots_of(m, rows))",
            "static_cast<int>(m / rows)",
        ),
    ),
    of_gemm(
        "grouped_sums_of_all_rows",
        "a step's sums go to all rows of the tile, since T has zeros there",
        "zero times NaN is NaN: one adapter's would reach the rows of others",
        (
            "const bool upper = row >= begin && row < end, lower = row + 8 >= begin && row + 8 < end;",
            "const bool upper = true, lower = true;",
        ),
    ),
    of_gemm(
        "grouped_copies_as_of_the_main_product",
        "steps of P Q copy no low-rank ones",
        "those are copied as their adapters' factors lie",
        ("    return loads.low_rank;\n", "    return false;\n"),
    ),
    of_gemm(
        "grouped_next_tile_begins_its_first_segment",
        "a tile ends where the next one's first segment begins",
        "that segment may have begun in this tile",
        (
            "const int end = next + static_cast<int>(g.segments[next].begin < row + kRows);",
            "const int end = next;",
        ),
    ),
    of_shrink(
        "grouped_shrink_masks_rows_of_x",
        "the mask is drawn for the rows that X has at the positions",
        "an expert's rows may be masked by other numbers",
        ("row_in_piece(p.mask_rows, piece", "row_in_piece(p.rows, piece"),
    ),
    of_shrink(
        "grouped_halves_end_at_the_rank",
        "of a pool in halves the rank's columns alone are read",
        "lo's follow them",
        ("Shrink::Factor::kSplit ? rank : columns", "rank"),
    ),
    of_shrink(
        "grouped_s_by_position",
        "S is read and written at the position",
        "it has the rows of Y",
        ("static_cast<int64_t>(row) * p.max_rank", "static_cast<int64_t>(at) * p.max_rank"),
    ),
    of_shrink(
        "grouped_weights_by_row_of_s",
        "a row's weight is read where S has the row",
        "weights are by position",
        ("weights.slots[at] : at", "weights.slots[at] : row"),
    ),
    of_wgrad(
        "grouped_wgrad_masks_rows_of_x",
        "the mask is drawn for the rows that X has at the positions",
        "an expert's rows may be masked by other numbers",
        ("row_in_piece(p.mask_rows, piece", "row_in_piece(product.rows, piece"),
    ),
    of_wgrad(
        "grouped_wgrad_stores_ranks_side_by_side",
        "dB's ranks are stored as neighbours",
        "between them are those of the other experts",
        ("c * to.b_pitch + column * p.gradients.b_step] =", "c * to.b_pitch + column] ="),
    ),
    of_wgrad(
        "grouped_sums_store_ranks_side_by_side",
        "dB's ranks are stored as neighbours after the sum of pieces",
        "between them are those of the other experts",
        ("c * to.b_pitch + column * p.gradients.b_step\n", "c * to.b_pitch + column\n"),
    ),
    of_scan(
        "grouped_weight_of_group",
        "a row tile names its group for the W",
        "several groups share one",
        ("key / p.groups_per_weight", "key"),
    ),
    of_scan(
        "grouped_carry_of_warps_read_early",
        "a warp reads what the others had without waiting for them",
        "they may not have written it",
        (
            "    if (lane == 31) of_warps[warp] = inclusive;\n    __syncthreads();\n",
            "    if (lane == 31) of_warps[warp] = inclusive;\n    __syncwarp();\n",
        ),
    ),
]

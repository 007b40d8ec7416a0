"""Plans and parameters of lora_decode, and what the rules cannot know of it."""

from emulated.mutants.faults.fault import Fault, faults_of

of_work = faults_of("decode/work.h")
of_finish = faults_of("decode/finish.h")
of_main = faults_of("decode/kernel.h")
of_table = faults_of("decode/table.h")
of_low_rank = faults_of("decode/low_rank.h")


def of_program(file: str):
    """Makes faults of what is no kernel, which the same program sees where it goes by a plan."""

    def fault(name: str, what: str, why: str, *edits: tuple[str, str]) -> Fault:
        return Fault(name, what, why, tuple((file, old, new) for old, new in edits), "lora_decode")

    return fault


of_plan = of_program("workspace.cpp")
of_shares = of_program("decode_shares.h")
of_params = of_program("decode/launch.h")
of_launch = of_program("decode/launch.h")

DECODE = [
    of_main(
        "decode_slot_of_the_block",
        "a block has one slot for its partial sums of Y",
        "it leaves those of every tile that it comes through, whose other parts may be late",
        (
            "finish.store_partial(p.sums, tile + static_cast<int>(blockIdx.x), acc);",
            "finish.store_partial(p.sums, static_cast<int>(blockIdx.x), acc);",
        ),
    ),
    of_shares(
        "decode_chunks_of_all_tiles_of_s",
        "a chunk of S has a slot whatever its tile",
        "each tile of S has its own sums",
        ("? tile * chunks() + chunk :", "? chunk :"),
    ),
    of_shares(
        "decode_last_block_of_the_next_unit",
        "a tile's parts end with the block that has the first unit of the next",
        "that is another block where the tile ends with one",
        ("block_of((tile + 1) * steps - 1);", "block_of((tile + 1) * steps);"),
    ),
    of_shares(
        "decode_blocks_by_units_alone",
        "a unit is the block's that would have it if there were no S",
        "blocks with a chunk of S have less of Y",
        (
            "    while (first(block) > at) --block;\n    while (first(block + 1) <= at) ++block;\n",
            "",
        ),
    ),
    of_shares(
        "decode_parts_of_s_are_its_chunks",
        "every chunk of S is a part of its own",
        "a block with several leaves one sum of them",
        ("return all_chunks() <= blocks;", "return true;"),
    ),
    of_work(
        "decode_chunks_of_the_next_tile",
        "a run of chunks goes on into the next tile of S",
        "each tile has sums of its own",
        (
            "min(chunks - chunk, walk.end_chunk - walk.next_chunk)",
            "walk.end_chunk - walk.next_chunk",
        ),
    ),
    of_finish(
        "decode_s_is_scaled",
        "S is kept with its scaling",
        "backward scales it again",
        ("p.max_rank + rank] = sum;", "p.max_rank + rank] = scaling * sum;"),
    ),
    of_finish(
        "decode_lo_beside_rank",
        "T's lo begins behind hi's own rank",
        "the product reads it from the width on",
        ("t[p.width] = low_half<T>(value);", "t[own.rank] = low_half<T>(value);"),
    ),
    of_finish(
        "decode_lo_counts_as_hi",
        "lo of S is added as it is",
        "it is kept kLoScale times as large",
        ("acc[j][e + 2 * kSplit] * (1.f / kLoScale<T>)", "acc[j][e + 2 * kSplit]"),
    ),
    of_low_rank(
        "decode_pairs_at_any_place",
        "two neighbours of a row of B are loaded at once wherever they lie",
        "a GPU loads from multiples of what it loads",
        ("if (places % sizeof(Pair) == 0 && column + 1 < rank)", "if (column + 1 < rank)"),
    ),
    of_low_rank(
        "decode_terms_with_lo_not_scaled",
        "products with lo are added as they are",
        "lo is kept kLoScale times as large",
        ("low.lo[j][e] * (1.f / kLoScale<T>);", "low.lo[j][e];"),
    ),
    of_low_rank(
        "decode_sums_of_the_last_adapter",
        "an adapter's sums begin with the last one's",
        "those went to other rows",
        ("if (piece.column == 0) low.clear();", "if (piece.number == 0) low.clear();"),
    ),
    of_main(
        "decode_s_is_brought_before_it_is_there",
        "a tile of S is counted before it is finished",
        "T may not be written when the last tile of S is counted",
        (
            "    finish.finish_s(walk.tile, parts.slot, parts.count);\n"
            "    if (s_is_complete()) signal_s_ready();\n",
            "    const bool last = s_is_complete();\n"
            "    finish.finish_s(walk.tile, parts.slot, parts.count);\n    if (last) signal_s_ready();\n",
        ),
    ),
    of_main(
        "decode_counts_stay",
        "the last to come leaves a tile's count",
        "the next launch finds it",
        ("      atomicExch(arrivals, 0u);\n", ""),
    ),
    of_main(
        "decode_s_is_brought_by_one_thread",
        "one thread counts S for all tiles of Y, without a fence of its own",
        "a tile that it finishes is read by all",
        (
            "const bool last = tile < work.shares.tiles && count(p.arrivals + tile, work.parts_of(tile));",
            "const bool last = tile < work.shares.tiles && ptx::atomic_add_relaxed_gpu(p.arrivals + tile, 1) "
            "== work.parts_of(tile) - 1 && atomicExch(p.arrivals + tile, 0u) > 0;",
        ),
    ),
    of_main(
        "decode_lo_rows_of_other_ranks",
        "the lower eight rows of a block of S are eight further ranks",
        "of floats they are lo of the same",
        ("(kSplit ? within % 8 : within)", "within"),
    ),
    of_work(
        "decode_chunk_after_the_last_step",
        "a part of S is kept as the chunk that its end is in",
        "that is the next chunk",
        ("(walk.end - 1) / Shares::kChunk", "walk.end / Shares::kChunk"),
    ),
    of_table(
        "decode_rank_of_the_largest",
        "every adapter has the largest rank",
        "past its own there may be anything",
        (
            "adapters[before] = {adapter_of[row], rank_at(p, adapter_of[row]), blocks_before, of_batch};",
            "adapters[before] = {adapter_of[row], p.max_rank, blocks_before, of_batch};",
        ),
    ),
    of_plan(
        "decode_sums_of_tiles_alone",
        "there is a slot of partial sums for each tile of Y",
        "each block that begins within a tile adds a part",
        (
            "workspace.take(shares.slots() * elements, kFloat)",
            "workspace.take(plan.tiles * elements, kFloat)",
        ),
    ),
    of_plan(
        "decode_sums_of_s_of_one_chunk",
        "there is a slot of partial sums for each tile of S",
        "each chunk along k has its own",
        (
            "workspace.take(shares.s_slots() * elements, kFloat)",
            "workspace.take(plan.s_tiles * elements, kFloat)",
        ),
    ),
    of_plan(
        "decode_t_of_one_half",
        "T has room for hi",
        "of float32 adapters it has lo, too",
        ("p.m * plan.terms * plan.width", "p.m * plan.width"),
    ),
    of_params(
        "decode_counts_of_s_are_those_of_y",
        "tiles of S are counted where those of Y are",
        "each has parts of its own number",
        (
            "params.s_arrivals = params.arrivals + plan.tiles;",
            "params.s_arrivals = params.arrivals;",
        ),
    ),
    of_params(
        "decode_without_scaling",
        "T is S",
        "Y has the scaled one",
        ("params.scaling = f.scaling;", "params.scaling = 1.f;"),
    ),
    of_launch(
        "decode_counts_are_not_cleared",
        "counts in the workspace are taken as they come",
        "other kernels have left theirs there",
        ("  if (clear) launch.clear(params.arrivals, plan.flag_count());\n", ""),
    ),
    of_launch(
        "decode_fewer_counts_are_cleared",
        "the counts of Y's tiles alone are cleared",
        "those of S lie behind them",
        (
            "launch.clear(params.arrivals, plan.flag_count());",
            "launch.clear(params.arrivals, plan.tiles);",
        ),
    ),
]

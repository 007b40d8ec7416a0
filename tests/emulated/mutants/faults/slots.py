"""What the rules cannot know of the kernels around the products of experts, of their launch and ops."""

from emulated.mutants.faults.fault import Fault, faults_of

of_routes = faults_of("experts/routes.h")
of_factors = faults_of("experts/factors.h")
of_launch = faults_of("experts/launch.h")
of_slots = faults_of("experts/slots.h")
of_rows = faults_of("tile/expert_rows.h")


def of_op(name: str, what: str, why: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, (("op/experts_routes.cpp", old, new),), "cuda")


SLOTS = [
    of_factors(
        "experts_first_adapter",
        "the factors of each adapter are written as the first one's",
        "an expert may have a group for each of several",
        ("expert * p.groups + p.group", "expert * p.groups"),
    ),
    of_routes(
        "experts_index_cut_first",
        "an expert's number is cut to 32 bits before it is looked at",
        "a number that is no expert may have the lower half of one",
        (
            "const Index expert = static_cast<const Index*>(p.routes.index)[chunk.row];",
            "const int expert = static_cast<int>(static_cast<const Index*>(p.routes.index)[chunk.row]);",
        ),
    ),
    of_routes(
        "experts_offs_begin",
        "offs has where an expert's rows begin",
        "it has where they end",
        ("(expert + int64_t{1}) * p.chunks()", "expert * int64_t{p.chunks()}"),
    ),
    of_routes(
        "experts_token_of_position",
        "a position's token is that of the slot of its number",
        "it is that of its own slot",
        ("= chunk.row / p.routes.slots;", "= position / p.routes.slots;"),
    ),
    of_routes(
        "experts_place_as_perm",
        "place has the slot of each position",
        "it is the inverse of perm",
        ("p.routes.place[chunk.row] = position;", "p.routes.place[position] = chunk.row;"),
    ),
    of_launch(
        "experts_one_kernel_for_all_chunks",
        "two chunks are sorted by the kernel of one",
        "it has one block",
        ("if (chunks == 1) return", "if (chunks <= 2) return"),
    ),
    of_launch(
        "experts_placed_before_begin",
        "slots are placed before the scan",
        "the counts do not say yet where an expert begins",
        (
            "  launch(lora_experts_begin<Index>, 1);\n  launch(lora_experts_place<Index>, chunks);\n",
            "  launch(lora_experts_place<Index>, chunks);\n  launch(lora_experts_begin<Index>, 1);\n",
        ),
    ),
    of_factors(
        "experts_s_of_the_first_adapter",
        "S and T of each adapter begin at rank 0",
        "adapters are joined along the rank",
        ("p.s_pitch + p.first + rank", "p.s_pitch + rank"),
        ("p.width + p.first + rank;\n    t[0]", "p.width + rank;\n    t[0]"),
    ),
    of_factors(
        "experts_b_by_expert",
        "the ranks of an expert lie beside each other in lora_b",
        "in PEFT's layout those of a rank do",
        (
            "(int64_t{row} * p.rank + rank) * p.experts + expert;",
            "(int64_t{row} * p.experts + expert) * p.rank + rank;",
        ),
        ("first + int64_t{i} * p.experts;", "first + i;"),
    ),
    of_factors(
        "experts_a_by_rank",
        "the experts of a rank lie beside each other in lora_a",
        "in PEFT's layout those of an expert do",
        ("int64_t{expert} * p.rank + rank)", "int64_t{rank} * p.experts + expert)"),
    ),
    of_factors(
        "experts_lo_behind_own_ranks",
        "lo begins behind the ranks of this adapter",
        "it begins behind the width of all",
        ("p.first + rank, p.width, p.ranks - rank", "p.first + rank, p.ranks, p.ranks - rank"),
    ),
    of_factors(
        "experts_a_scaled_too",
        "both factors have the scale",
        "the update would have its square",
        (
            "numbers[i] = static_cast<float>(chunk.of[i]);",
            "numbers[i] = 1.7f * static_cast<float>(chunk.of[i]);",
        ),
    ),
    of_factors(
        "experts_without_zeros",
        "ranks past the adapter's own stay as they are",
        "NaN times zero is NaN",
        ("row >= p.out || rank >= p.ranks", "row >= p.out || rank >= p.rank"),
        ("p.width, p.ranks - rank", "p.width, p.rank - rank"),
    ),
    of_launch(
        "experts_grid_of_a",
        "the grid has the blocks of lora_a alone",
        "lora_b may have more",
        (
            "std::max((parts + Factors::kWarps - 1) / Factors::kWarps, tiles)",
            "std::max((parts + Factors::kWarps - 1) / Factors::kWarps, int64_t{1})",
        ),
    ),
    of_launch(
        "experts_grid_of_b",
        "the grid has the blocks of lora_b alone",
        "lora_a may have more",
        ("std::max((parts + Factors::kWarps - 1) / Factors::kWarps, tiles)", "tiles"),
    ),
    of_slots(
        "experts_weight_of_position",
        "a row's weight is that of the slot of its position's number",
        "weights are by slot",
        ("p.weights_in_float, first + i)", "p.weights_in_float, positions[i])"),
    ),
    of_slots(
        "experts_sum_in_halves",
        "a token's sum is rounded after each slot",
        "it is rounded once",
        (
            "sum[e] = fmaf(weights[i], static_cast<float>(chunks[i].of[e]), sum[e]);",
            "sum[e] = static_cast<float>(rounded<T>(fmaf(weights[i], static_cast<float>(chunks[i].of[e]), sum[e])));",
        ),
    ),
    of_slots(
        "experts_gradient_at_position",
        "a weight's gradient is written at its position",
        "it is written at its slot",
        (
            "static_cast<float*>(p.dweights)[slot] = sum;",
            "static_cast<float*>(p.dweights)[blockIdx.x * 8 + threadIdx.x / 32] = sum;",
        ),
    ),
    of_slots(
        "experts_dot_of_weighted",
        "x is multiplied by weight * dx'",
        "the weight's gradient does not have the weight",
        (
            "if (p.bias != nullptr) add_bias",
            "sum *= weight_at<T>(p.weights, p.weights_in_float, slot);\n      if (p.bias != nullptr) add_bias",
        ),
    ),
    of_slots(
        "experts_bias_of_position",
        "the gradient of a token's y is looked up by position",
        "it has a row for each token",
        ("slot / p.slots, expert_of", "position / p.slots, expert_of"),
    ),
    of_rows(
        "experts_without_xor",
        "lane 0 adds the lanes of the lower half",
        "a row is in all 32",
        ("int distance = 16; distance > 0", "int distance = 8; distance > 0"),
    ),
    of_op(
        "experts_last_slot_alone",
        "the positions with an expert are those of the first one",
        "the last one's rows end there",
        "at(offs) + offs.numel() - 1",
        "at(offs)",
    ),
    of_op(
        "experts_pitch_of_x_for_dx",
        "dx has the pitch of x",
        "it may be a slice of more columns",
        "params.dx_pitch = kernel_launch::pitch_of(dx)",
        "params.dx_pitch = kernel_launch::pitch_of(x)",
    ),
    of_op(
        "experts_all_factors_as_the_first",
        "every adapter begins at rank 0",
        "it begins behind the one before",
        "++i, params.first += by_row ? 0 : params.ranks",
        "++i",
    ),
    of_op(
        "experts_weights_always_halves",
        "weights are read as halves",
        "a router's may be floats",
        "params.weights_in_float = weights && in_float(*weights)",
        "params.weights_in_float = false",
    ),
]

"""What the rules cannot know of the kernels that dequantise, of their launch and of their op."""

from emulated.mutants.faults.fault import Fault, faults_of

of_4bit = faults_of("dequantize/formats.h")
of_8bit = faults_of("dequantize/formats.h")
of_tile = faults_of("dequantize/formats.h")


def of_cuda(file: str, name: str, what: str, why: str, old: str, new: str) -> Fault:
    return Fault(name, what, why, ((file, old, new),), "cuda")


DEQUANTIZE = [
    of_4bit(
        "dequantize_scale_fused",
        "a block's scale is made by a fused multiply-add",
        "bitsandbytes rounds the product before it adds the offset",
        (
            "__fadd_rn(__fmul_rn(p.scale_table[p.scale_codes[block]], factor), *p.scale_offset)",
            "fmaf(p.scale_table[p.scale_codes[block]], factor, *p.scale_offset)",
        ),
    ),
    of_4bit(
        "dequantize_scale_of_the_first_blocks",
        "every block of scales has the first one's scale",
        "scales were quantised in blocks",
        ("p.scale_scale[block >> p.scale_block_bits]", "p.scale_scale[0]"),
    ),
    of_4bit(
        "dequantize_lower_half_first",
        "the first code of a byte is in its lower half",
        "it is in the upper one",
        ("i / 2 * 8 + (1 - i % 2) * 4", "i / 2 * 8 + i % 2 * 4"),
    ),
    of_4bit(
        "dequantize_table_once",
        "the upper half of the warp has the last value of the table",
        "a code's lane has a bit of the code above it",
        ("p.table[lane % 16]", "p.table[min(lane, 15)]"),
    ),
    of_4bit(
        "dequantize_blocks_beyond_the_tile",
        "every lane reads a scale",
        "of the last tile there are none",
        ("min(lane, last_block)", "lane"),
    ),
    of_4bit(
        "dequantize_scale_of_the_lane",
        "a chunk has the scale of its lane's first one",
        "the other chunks of a lane lie in other blocks",
        ("scale, at >> p.block_bits", "scale, lane * Tile::kChunk >> p.block_bits"),
    ),
    of_8bit(
        "dequantize_row_of_the_tile",
        "all of a tile has the scale of its first row",
        "a tile goes over rows",
        ("p.scale[row + at / p.columns]", "p.scale[row]"),
    ),
    of_8bit(
        "dequantize_tile_begins_a_row",
        "a tile begins at column 0",
        "it may begin in the middle of a row",
        ("first - row * p.columns", "int64_t{0}"),
    ),
    of_8bit(
        "dequantize_multiplier_last",
        "code and scale are multiplied first",
        "it is rounded elsewhere than on the CPU",
        (
            "static_cast<float>(bytes[i]) * scale;",
            "static_cast<float>(bytes[i]) * p.scale[row + at / p.columns] * p.multiplier;",
        ),
    ),
    of_tile(
        "dequantize_pairs_swapped",
        "two values of a word change places",
        "the first is in the lower half",
        ("rounded_pair<T>(v[2], v[3])", "rounded_pair<T>(v[3], v[2])"),
    ),
    of_tile(
        "dequantize_rows_of_the_first_experts",
        "a matrix is left out by the rows of the expert of its number",
        "a slice begins at a later expert",
        ("has_rows(p.offs, p.first + matrix)", "has_rows(p.offs, matrix)"),
    ),
    of_cuda(
        "kernels/launch/dequantize.cu",
        "dequantize_whole_blocks_alone",
        "the grid has whole blocks of the weight alone",
        "the last one may not be whole",
        "(params.count + kBlockValues - 1) / kBlockValues",
        "(params.count + 1) / kBlockValues",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_out_counts_as_aligned",
        "stores are of 16 bytes wherever out begins",
        "a view may begin anywhere",
        "params.aligned &= is_aligned(params.out, 16);",
        "",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_rows_count_as_whole_chunks",
        "chunks of codes of 8 bits are whole whatever a row's length",
        "a chunk would have two scales",
        "is_aligned(params.codes, 8) && out.size(1) % chunk == 0",
        "is_aligned(params.codes, 8)",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_block_of_scales",
        "scales are quantised in blocks as long as the codes'",
        "they have their own",
        'bits_of("scale_block", nested.block, 1)',
        'bits_of("scale_block", weight.block, 1)',
    ),
]

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
        "dequantize_tail_upper_half_first",
        "outside of whole tiles the first code of a byte is always in its upper half",
        "a weight says which",
        ("(i % 2 == 0) == p.low_first ? byte & 15 : byte >> 4", "i % 2 ? byte & 15 : byte >> 4"),
    ),
    of_4bit(
        "dequantize_halves_of_other_bytes",
        "codes of another order are moved by a shift of the word alone",
        "a half comes from the byte beside",
        ("(codes >> 4 & 0x0F0F0F0Fu)", "codes >> 4"),
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
        ("held, at >> p.block_bits", "held, lane * Tile::kChunk >> p.block_bits"),
    ),
    of_8bit(
        "dequantize_row_of_the_tile",
        "all of a tile has the scales of its first row",
        "a tile goes over rows",
        ("scale_of(p, first_row + rows, at", "scale_of(p, first_row, at"),
    ),
    of_8bit(
        "dequantize_column_of_the_tile",
        "a chunk's column is counted from the tile's first row",
        "a tile goes over rows",
        ("at - rows * p.columns);", "at);"),
    ),
    of_8bit(
        "dequantize_tile_begins_a_row",
        "a tile begins at column 0",
        "it may begin in the middle of a row",
        ("first - row * p.columns", "int64_t{0}"),
    ),
    of_8bit(
        "dequantize_first_column_outside_of_tiles",
        "outside of whole tiles a value has the scale of its row's first block",
        "rows have blocks",
        ("static_cast<uint32_t>(i - row * p.columns)", "0u"),
    ),
    of_8bit(
        "dequantize_scale_of_the_first_column",
        "a row of blocks has its first one's scale",
        "blocks have some of the columns",
        ("scale[block + (column >> p.column_bits)]", "scale[block]"),
    ),
    of_8bit(
        "dequantize_scale_of_the_first_rows",
        "a matrix has the scales of its first row of blocks",
        "blocks have some of the rows",
        ("static_cast<uint64_t>(row >> p.row_bits) * p.scale_columns", "uint64_t{0}"),
    ),
    of_8bit(
        "dequantize_scale_of_the_first_matrix",
        "every matrix has the scales of the first",
        "scales follow each other, as matrices do",
        ("p.scale + static_cast<int>(blockIdx.y) * p.scales", "p.scale"),
    ),
    of_8bit(
        "dequantize_blocks_through_matrices",
        "rows of blocks are counted through all matrices",
        "a matrix begins a block, whatever rows its last one has",
        ("p.scale + static_cast<int>(blockIdx.y) * p.scales", "p.scale"),
        ("row - static_cast<int>(blockIdx.y) * p.rows", "row"),
    ),
    of_8bit(
        "dequantize_multiplier_last",
        "code and scale are multiplied first",
        "it is rounded elsewhere than on the CPU",
        ("(column >> p.column_bits)] * p.multiplier", "(column >> p.column_bits)]"),
        ("values[0] * scale", "values[0] * scale * p.multiplier"),
        ("four[i] * scale", "four[i] * scale * p.multiplier"),
    ),
    of_8bit(
        "dequantize_codes_without_a_sign",
        "int8 codes are those of 0 to 255",
        "half of them are below 0",
        ("values[i] = bytes[i];", "values[i] = static_cast<uint8_t>(bytes[i]);"),
    ),
    of_8bit(
        "dequantize_float8_without_a_sign",
        "the sign of e4m3 is lost",
        "half of the codes are below 0",
        ("(apart & 0x80008000u) | magnitude | nan", "magnitude | nan"),
    ),
    of_8bit(
        "dequantize_float8_of_another_bias",
        "the first of two e4m3 codes has a bias of 8, as e4m3fnuz has",
        "it is 7",
        (
            "values[i] = __half2float(halves[0]) * 256.f",
            "values[i] = __half2float(halves[0]) * 128.f",
        ),
    ),
    of_8bit(
        "dequantize_float8_without_subnormals",
        "e4m3 below the smallest normal value is zero",
        "seven steps are below it",
        (
            "values[i + 2] = __half2float(halves[1]) * 256.f",
            "values[i + 2] = (magnitude >> 26) == 0 ? 0.f : __half2float(halves[1]) * 256.f",
        ),
    ),
    of_8bit(
        "dequantize_float8_largest_exponent_as_infinite",
        "all of e4m3 with the largest exponent is no number",
        "0x7F alone is none",
        ("(magnitude + 0x00800080u)", "(magnitude + 0x04000400u)"),
    ),
    of_8bit(
        "dequantize_float8_without_nan",
        "0x7F of e4m3 is 480",
        "it is NaN",
        ("(apart & 0x80008000u) | magnitude | nan", "(apart & 0x80008000u) | magnitude"),
    ),
    of_8bit(
        "dequantize_float8_next_codes",
        "two codes of a word that lie side by side are taken for those two apart",
        "a word has the first and the third in the lower bytes of its halves",
        ("i == 0 ? codes << 8 : codes", "i == 0 ? codes : codes << 8"),
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
        "is_aligned(params.codes, 8) && columns % chunk == 0",
        "is_aligned(params.codes, 8)",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_blocks_count_as_whole_chunks",
        "chunks of codes of 8 bits are whole whatever a block's length",
        "a chunk would have two scales",
        "(across == 1 || weight.block % chunk == 0)",
        "(across == 1 || weight.block > 0)",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_order_of_codes_not_told",
        "the kernel is not told the order of the codes of a byte",
        "a weight may have either",
        "params.low_first = weight.low_first;",
        "",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_whole_blocks_of_rows",
        "scales of a matrix are counted for whole blocks of rows alone",
        "the last one may not be whole",
        "cpu::divide_up(rows, weight.block_rows)",
        "rows / weight.block_rows",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_whole_blocks_of_columns",
        "scales of a row are counted for whole blocks alone",
        "the last one may not be whole",
        "cpu::divide_up(columns, weight.block)",
        "columns / weight.block",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_whole_size_as_bits",
        "a block that is all of a row is a power of two, too",
        "rows have any length",
        "block >= size ? 31 : bits_of(name, block, 0)",
        "bits_of(name, block, 0)",
    ),
    of_cuda(
        "op/dequantize.cpp",
        "dequantize_float8_as_int8",
        "codes in e4m3 are launched as int8",
        "both are bytes",
        "weight.is_float8() ? dequantize_bytes<kernel::DequantizeFloat8Params>(weight, out)",
        "weight.is_float8() ? dequantize_bytes<kernel::Dequantize8bitParams>(weight, out)",
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

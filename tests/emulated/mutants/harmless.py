"""Mutants that the tests demand to pass: they compute the same, only slower, or change nothing.

By name, or by program and name where a program cannot see what another does.
"""

ONE_DRAW_EACH = "a draw for each element, where one in eight would do"
NEXT_GRID = (
    "the next grid begins when this one has ended, or could begin before: it waits where it must"
)
LARGE_FLOAT = "a float as large as that and one more are the same"
EIGHT_STORES = "eight stores of 2 bytes, where one of 16 would do"
EIGHT_LOADS = "eight loads of a float, where two of 16 bytes would do"
NOTHING_LEFT = "of a chunk behind the row's end nothing is loaded or stored"
ONE_BY_ONE = "two loads of an element, where one of both would do"
OTHERS = "adapters without a row in a part of the batch are multiplied for it, too, and not added"
WHOLE_CHUNKS = "columns are multiples of 8"
NO_ROW = "rows past the tile's end are not copied, wherever they are"
EVERY_LANE = "every lane waits for its bulk groups, of which only the elected one has any"

HARMLESS = {
    "gemm/sm90a/mask_ahead.begin.tile==of_tile:never": "all bits are drawn again",
    "tile/mask.aligned_to_draws.col_offset%32==0:never": ONE_DRAW_EACH,
    "skinny/shrink.mask.dropout.aligned_to_draws():never": ONE_DRAW_EACH,
    "skinny/wgrad.mask.dropout.aligned_to_draws():never": ONE_DRAW_EACH,
    "skinny/shrink.mask.k16%2==0:always": "the other half of the columns is drawn for again",
    "tile/halves.high_half.fabsf(value)>kLargest:low": LARGE_FLOAT,
    "tile/halves.high_half.fabsf(value)>kLargest:high": LARGE_FLOAT,
    "tile/halves.high_half.fabsf(value)<=kLargestFloat:low": LARGE_FLOAT,
    "tile/halves.high_half.fabsf(value)<=kLargestFloat:high": LARGE_FLOAT,
    "tile/factor_chunk.load.kSplit&&place.aligned&&place.left>=kElements:never": EIGHT_LOADS,
    "tile/factor_chunk.load.place.left>=kElements:high": EIGHT_LOADS,
    "grouped/segments.batch.t.row_tiles==nullptr:never": "row tiles are counted for no table",
    "gemm/sm80/kernel.run.found.is_empty():never": "of all rows no tile is empty",
    "grouped/own_weights.is_empty.count==0:never": "no row of an empty tile is stored",
    "grouped/own_weights_sm90a.next.!span.is_empty():always": "no row of an empty tile is stored",
    "grouped/own_weights_sm90a.ends.work.tile>=block.tiles:high": "behind the last is an empty one",
    "grouped/own_weights_sm90a.row_of.in_tile<work.span.count:always": NO_ROW,
    "grouped/own_weights_sm90a.row_of.in_tile<work.span.count:high": NO_ROW,
    "grouped/own_weights_sm90a.load_main_product.column<k0:low": WHOLE_CHUNKS,
    "grouped/own_weights_sm90a.store_chunks.column<p.n:low": WHOLE_CHUNKS,
    "grouped/own_weights_sm90a.lora_grouped_gemm_own_weights_sm90a.o.gemm.k>0:never": (
        "a tensor map less is prefetched"
    ),
    "gemm/sm80/kernel.multiply_main.!rows.has_products():never": "of all rows every tile has them",
    "gemm/sm80/loads.place_of.row_tiles-first>=kGroup:high": (
        "eight rows that are left are a group"
    ),
    "gemm/sm80/kernel.multiply_main.adapters.copies_apart(loads):always": (
        "a quarter's copies, products and loads, one after the other"
    ),
    "gemm/sm80/kernel.multiply_main.adapters.copies_apart(loads):never": (
        "one adapter's steps have no other copies"
    ),
    "tile/mask.draw.mask.aligned_to_draws():never": ONE_DRAW_EACH,
    "gemm/sm90a/pipeline.place_of.row_pairs-first>=kGroup:high": "as in gemm/sm80",
    "gemm/sm80/epilogue.add_base.e<left:always": "what lies beside Y's columns is not stored",
    "gemm/sm80/epilogue.add_base.e<left:high": "what lies beside Y's columns is not stored",
    "gemm/sm80/epilogue.store_slab.row0+row<p.m:high": "what lies below Y is not stored",
    "gemm/sm80/epilogue.copy_chunk.whole_chunks&&left>=8:never": EIGHT_STORES,
    "gemm/sm80/epilogue.copy_chunk.Tile::kN>64||p.whole_chunks:never": EIGHT_STORES,
    "gemm/sm90a/kernel.dispatch_role.setmaxnreg_inc:skip": "the consumers spill",
    "gemm/sm90a/pipeline.set_up.p.k>0:never": "two tensor maps less are prefetched",
    "gemm/sm90a/store.put_bias.!bias.given():never": "zeros are put where there is no bias",
    "gemm/sm90a/store.wait_until_free.ptx::elect_sync():always": EVERY_LANE,
    "gemm/sm90a/store.drain.ptx::elect_sync():always": EVERY_LANE,
    "gemm/sm90a/load.produce.!t_is_written:always": "waits again for what has ended",
    "gemm/sm90a/load.wait_for_t.block.p.trigger_dependents:always": NEXT_GRID,
    "gemm/sm90a/load.wait_for_t.block.p.trigger_dependents:never": NEXT_GRID,
    "gemm/sm90a/load.launch_dependents.griddepcontrol_launch_dependents:skip": NEXT_GRID,
    "decode/finish.add_all.first<count:high": "a round without parts",
    "decode/finish.finish_s.inside:always": (
        "past a rank S is zero but where x is infinite, which it is in no case"
    ),
    "decode/kernel.s_is_complete.work.shares.s_tiles>1:always": "a single tile is counted, too",
    "decode/kernel.signal_s_ready.first<work.shares.tiles:high": "a round without tiles",
    "decode/low_rank.load_pair.places%sizeof(Pair)==0&&column+1<rank:never": ONE_BY_ONE,
    "decode/low_rank.load_pair.column+1<rank:low": ONE_BY_ONE,
    "decode/low_rank.multiply.(rows>>j&1)==0:never": "zeros of others' rows are multiplied",
    "decode/low_rank.next_number.number<table.count&&rows_from(j0,number)==0:never": OTHERS,
    "decode/low_rank.next_number.number<table.count:low": OTHERS,
    "decode/kernel.part_of_s.finish.has_s(walk.tile):always": (
        "zeros of no adapter's rows are kept, too, where nobody reads them"
    ),
    "experts/chunk.is_whole.left>=kElements:high": EIGHT_LOADS,
    "experts/chunk.is_whole.reinterpret_cast<uintptr_t>(at)%16==0&&left>=kElements:never": (
        EIGHT_LOADS
    ),
    "experts/chunk.load.is_whole(from,left):never": EIGHT_LOADS,
    "experts/chunk.store.is_whole(to,left):never": EIGHT_STORES,
    "experts/factors.copy_a.column>=p.in:high": NOTHING_LEFT,
    "experts/factors.multiply_a.column<p.in:high": NOTHING_LEFT,
    "experts/factors.store_chunk.rank>=p.ranks:high": NOTHING_LEFT,
    "experts/factors.turn_b.row0>=p.out:never": "blocks behind the last row load and store nothing",
    "experts/factors.turn_b.row0>=p.out:high": "a block behind the last row stores nothing",
    "experts/routes.key.expert>=p.rows.groups:high": "the number of experts is that of no expert",
    "experts/slots.lora_experts_sum.column<p.n:always": NOTHING_LEFT,
    "experts/slots.lora_experts_sum.column<p.n:high": NOTHING_LEFT,
    "experts/slots.add.p.pitch%kChunk==0&&RowChunk<T>::is_whole(rows,p.n-column):never": (
        EIGHT_LOADS
    ),
    "experts/slots.add.Chunk::is_whole(a,left)&&Chunk::is_whole(b,left):never": EIGHT_LOADS,
    "experts/slots.add_slots.slot<p.slots:high": "a round of no slots more",
    "experts/slots.scale_row.column<p.n:high": NOTHING_LEFT,
    "experts/slots.add_bias.column<p.bias_n:high": NOTHING_LEFT,
    "grouped/segments.begin_chunks.first<all:high": "a round of no counts more",
    "grouped/segments.begin_chunks.i<left:low": "nothing begins behind the last count",
    "grouped/segments.run.first<groups:high": "a batch of no adapters more",
    "skinny/elementwise.lora_reduce.griddepcontrol_launch_dependents:skip": NEXT_GRID,
    "skinny/elementwise.lora_reduce.threadIdx.x==0:always": "every thread does it",
    "skinny/elementwise.lora_reduce.threadIdx.x==0:never": NEXT_GRID,
    "skinny/wgrad.wait_for_dx.blockIdx.x+blockIdx.y+blockIdx.z==0:always": (
        "blocks stay where others could run"
    ),
    "skinny/wgrad.run.c0>=product.c||column0>=product.columns:never": (
        "blocks beyond the narrower of two products multiply zeros"
    ),
    "skinny/wgrad.run.c0>=product.c:high": "as without the return",
    "skinny/wgrad.run.column0>=product.columns:high": "as without the return",
    "skinny/wgrad.run.column0>=product.columns:low": "columns are whole chunks",
}

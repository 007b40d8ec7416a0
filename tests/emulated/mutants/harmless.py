"""Mutants that the tests demand to pass: they compute the same, only slower, or change nothing.

By name, or by program and name where a program cannot see what another does.
"""

ONE_DRAW_EACH = "a draw for each element, where one in eight would do"
NEXT_GRID = (
    "the next grid begins when this one has ended, or could begin before: it waits where it must"
)
LARGE_FLOAT = "a float as large as that and one more are the same"
EIGHT_STORES = "eight stores of 2 bytes, where one of 16 would do"
ONE_BY_ONE = "two loads of an element, where one of both would do"
OTHERS = "adapters without a row in a part of the batch are multiplied for it, too, and not added"
EVERY_LANE = "every lane waits for its bulk groups, of which only the elected one has any"

HARMLESS = {
    "lora_gemm_sm90a/mask_ahead.begin.tile==of_tile:never": "all bits are drawn again",
    "mask.in_step.col_offset%32==0:never": ONE_DRAW_EACH,
    "lora_shrink_sm80.mask.dropout.in_step():never": ONE_DRAW_EACH,
    "lora_wgrad_sm80.mask.dropout.in_step():never": ONE_DRAW_EACH,
    "lora_shrink_sm80.mask.k16%2==0:always": "the other half of the columns is drawn for again",
    "halves.high_half.fabsf(value)>kLargest:low": LARGE_FLOAT,
    "halves.high_half.fabsf(value)>kLargest:high": LARGE_FLOAT,
    "halves.high_half.fabsf(value)<=kLargestFloat:low": LARGE_FLOAT,
    "halves.high_half.fabsf(value)<=kLargestFloat:high": LARGE_FLOAT,
    "lora_gemm_sm80_loads.place_of.row_tiles-first>=kGroup:high": (
        "eight rows that are left are a group"
    ),
    "lora_gemm_sm80.multiply_main.adapters.copies_apart(loads):always": (
        "a quarter's copies, products and loads, one after the other"
    ),
    "lora_gemm_sm80.multiply_main.adapters.copies_apart(loads):never": (
        "one adapter's steps have no other copies"
    ),
    "mask_shares.draw.mask.in_step():never": ONE_DRAW_EACH,
    "lora_gemm_sm90a/pipeline.place_of.row_pairs-first>=kGroup:high": "as in lora_gemm_sm80",
    "lora_gemm_sm80_epilogue.add_base.e<left:always": "what lies beside Y's columns is not stored",
    "lora_gemm_sm80_epilogue.add_base.e<left:high": "what lies beside Y's columns is not stored",
    "lora_gemm_sm80_epilogue.store_slab.row0+row<p.m:high": "what lies below Y is not stored",
    "lora_gemm_sm80_epilogue.copy_chunk.whole_chunks&&left>=8:never": EIGHT_STORES,
    "lora_gemm_sm80_epilogue.copy_chunk.Tile::kN>64||p.whole_chunks:never": EIGHT_STORES,
    "lora_gemm_sm90a/kernel.take_role.setmaxnreg_inc:skip": "the consumers spill",
    "lora_gemm_sm90a/pipeline.set_up.p.k>0:never": "two tensor maps less are prefetched",
    "lora_gemm_sm90a/store.put_bias.!bias.given():never": "zeros are put where there is no bias",
    "lora_gemm_sm90a/store.wait_until_free.ptx::elect_sync():always": EVERY_LANE,
    "lora_gemm_sm90a/store.drain.ptx::elect_sync():always": EVERY_LANE,
    "lora_gemm_sm90a/load.produce.!t_is_written:always": "waits again for what has ended",
    "lora_gemm_sm90a/load.wait_for_t.block.p.lets_wgrad_begin:always": NEXT_GRID,
    "lora_gemm_sm90a/load.wait_for_t.block.p.lets_wgrad_begin:never": NEXT_GRID,
    "lora_gemm_sm90a/load.wait_for_t.griddepcontrol_launch_dependents:skip": NEXT_GRID,
    "lora_gemm_sm90a/in_grid.produce.jobs.block.p.lets_wgrad_begin:always": NEXT_GRID,
    "lora_gemm_sm90a/in_grid.produce.jobs.block.p.lets_wgrad_begin:never": NEXT_GRID,
    "lora_gemm_sm90a/in_grid.produce.griddepcontrol_launch_dependents:skip": NEXT_GRID,
    "lora_decode_finish.add_all.first<count:high": "a round without parts",
    "lora_decode_finish.finish_s.inside:always": (
        "past a rank S is zero but where x is infinite, which it is in no case"
    ),
    "lora_decode_sm80.bring_s.first<work.shares.tiles:high": "a round without tiles",
    "lora_decode_low_rank.load_pair.places%sizeof(Pair)==0&&column+1<rank:never": ONE_BY_ONE,
    "lora_decode_low_rank.load_pair.column+1<rank:low": ONE_BY_ONE,
    "lora_decode_low_rank.multiply.(rows>>j&1)==0:never": "zeros of others' rows are multiplied",
    "lora_decode_low_rank.next_number.number<table.count&&rows_from(j0,number)==0:never": OTHERS,
    "lora_decode_low_rank.next_number.number<table.count:low": OTHERS,
    "lora_decode_sm80.part_of_s.finish.has_s(walk.tile):always": (
        "zeros of no adapter's rows are kept, too, where nobody reads them"
    ),
    "lora_grouped_segments.run.first<groups+1:high": "a batch of no adapters more",
    "lora_reduce.lora_reduce.griddepcontrol_launch_dependents:skip": NEXT_GRID,
    "lora_gemm_sm90a/jobs.schedule.job<count():high": "a ticket is drawn that nobody reads",
    "lora_gemm_sm90a/jobs.next.threadIdx.x>=Tile::kWarpgroup:low": "that thread reads no ticket",
    "lora_wgrad_sm80.wait_for_dx.blockIdx.x+blockIdx.y+blockIdx.z==0:always": (
        "blocks stay where others could run"
    ),
    "lora_wgrad_sm80.run.c0>=product.c||column0>=product.columns:never": (
        "blocks beyond the narrower of two products multiply zeros"
    ),
    "lora_wgrad_sm80.run.c0>=product.c:high": "as without the return",
    "lora_wgrad_sm80.run.column0>=product.columns:high": "as without the return",
    "lora_wgrad_sm80.run.column0>=product.columns:low": "columns are whole chunks",
    "lora_wgrad_sm80.wait_for_u.threadIdx.x==0:always": "every thread polls",
}

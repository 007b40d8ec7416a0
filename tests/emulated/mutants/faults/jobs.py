"""Jobs that one thread draws for both blocks of a cluster, and the flags by which T is published."""

from emulated.mutants.faults.fault import Fault, faults_of

FILE = "gemm/sm90a/jobs.h"
FUSED_SHRINK = "gemm/sm90a/fused_shrink.h"

EMPTY = "      ptx::mbarrier_wait_cluster(empty(ring.slot), ring.parity ^ 1);\n"
STORE = (
    "        ptx::store_shared_cluster<uint32_t>(ptx::map_shared(ticket(ring.slot), to),\n"
    "                                            static_cast<uint32_t>(job));\n"
)
ARRIVE = "        ptx::mbarrier_arrive_cluster(full(ring.slot), to);\n"
FULL = "    ptx::mbarrier_wait_cluster(full(ring.slot), ring.parity);\n"
READ = (
    "    const int job = static_cast<int>(ptx::load_shared_cluster<uint32_t>(ticket(ring.slot)));\n"
)
SYNC = "    if (threadIdx.x >= Tile::kWarpgroup) __syncwarp();  // every lane has read it\n"
RELEASE = "    if (reader) ptx::mbarrier_arrive_cluster(empty(ring.slot), 0);\n"
PUBLISH = "    ptx::atomic_add_release_gpu(in.ready + row / Tile::kM, 1);\n"
BARRIER = "    consumer.epilogue.warpgroup_barrier();\n"
CALL = "    if (consumer.epilogue.thread == 0) jobs.publish(row);\n"

of_jobs = faults_of(FILE)
of_shrink = faults_of(FUSED_SHRINK)


JOBS = [
    of_jobs(
        "ticket_read_after_release",
        "the slot is released before the ticket is read",
        "the scheduler may write the next ticket into it",
        (READ + SYNC + RELEASE, RELEASE + READ),
    ),
    of_jobs(
        "ticket_syncwarp_after_release",
        "the warp synchronises after its first lane has released the slot",
        "the other lanes may not have read the ticket yet",
        (SYNC + RELEASE, RELEASE + SYNC),
    ),
    of_jobs(
        "ticket_stored_before_empty",
        "the scheduler writes the ticket, then awaits the empty slot",
        "readers of the ticket before may not have read it",
        (EMPTY, ""),
        (ARRIVE, "        if (to == 0)" + EMPTY + ARRIVE),
    ),
    of_jobs(
        "ticket_arrive_before_store",
        "the scheduler arrives at the full barrier, then writes the ticket",
        "readers may come before the ticket",
        (STORE + ARRIVE, ARRIVE + STORE),
    ),
    of_jobs(
        "ticket_address_not_mapped",
        "the scheduler writes each block's ticket at its own shared address",
        "block 1's slot is never written",
        (
            "ptx::map_shared(ticket(ring.slot), to),",
            "ptx::map_shared(ticket(ring.slot), block.rank),",
        ),
    ),
    of_jobs(
        "ticket_released_to_own_rank",
        "block 1's readers release the slot at their own block's barrier",
        "the scheduler waits at that of block 0",
        (RELEASE, RELEASE.replace(", 0)", ", block.rank)")),
    ),
    of_jobs(
        "ticket_waited_in_block_scope",
        "the ticket is awaited with the block's scope (try_wait without .cluster)",
        "the ticket is an ordinary store of another block's thread: the acquire's scope leaves it out",
        (FULL, FULL.replace("mbarrier_wait_cluster", "mbarrier_wait")),
    ),
    of_jobs(
        "ticket_waited_at_the_peer",
        "both blocks wait at block 0's full barrier and read block 0's ticket",
        "mbarrier.try_wait takes the block's own barriers only",
        (FULL, FULL.replace("full(ring.slot)", "ptx::map_shared(full(ring.slot), 0)")),
        (READ, READ.replace("ticket(ring.slot)", "ptx::map_shared(ticket(ring.slot), 0)")),
    ),
    of_jobs(
        "ticket_reset_at_start",
        "the first cluster also sets the job counter to zero when it starts",
        "another cluster may have drawn a job already",
        (
            "      for (int slot = 0; slot < Layout::kTickets; ++slot) {\n",
            "      if (blockIdx.x == 0) *in.ticket = 0;\n"
            "      for (int slot = 0; slot < Layout::kTickets; ++slot) {\n",
        ),
    ),
    of_jobs(
        "tickets_over_a_barrier",
        "the tickets start in the last of the barriers",
        "an mbarrier object is accessed as an ordinary word",
        (
            "return block.shared + Layout::kTicket + 4 *",
            "return block.shared + Layout::kTicket - 8 + 4 *",
        ),
    ),
    of_jobs(
        "tiles_before_t",
        "jobs for tiles are drawn before those for T",
        "with fewer clusters than tiles all of them wait for a T that nobody has begun",
        ("return job < jobs_for_t;", "return job >= block.tiles;"),
        ("return job - jobs_for_t;", "return job;"),
        ("return job * Tile::kPairM", "return (job - block.tiles) * Tile::kPairM"),
    ),
    of_shrink(
        "publish_before_barrier",
        "the flag of T is counted before the warpgroup's barrier",
        "the other threads' rows of T may not have been written",
        (BARRIER + CALL, CALL + BARRIER),
    ),
    of_jobs(
        "publish_relaxed",
        "the flag of T is counted by a relaxed atomic",
        "T is not ordered before the flag",
        (PUBLISH, PUBLISH.replace("release", "relaxed")),
    ),
    of_jobs(
        "publish_all_relaxed",
        "the count of written parts, by which the next grid waits, is a relaxed atomic",
        "T is not ordered before it",
        (
            "ptx::atomic_add_release_gpu(in.written, 1)",
            "ptx::atomic_add_relaxed_gpu(in.written, 1)",
        ),
    ),
    of_shrink(
        "publish_for_the_other_warpgroup",
        "the first consumer warpgroup counts for both",
        "its barrier says nothing of the second one's rows",
        (
            CALL,
            "    if (consumer_index == 0 && consumer.epilogue.thread == 0) jobs.publish(row), jobs.publish(row);\n",
        ),
    ),
    of_jobs(
        "publish_by_load_and_store",
        "the flag of T is counted by an acquire load and an ordinary store",
        "both warpgroups may read the same count, and one increment is lost",
        (
            PUBLISH,
            "    in.ready[row / Tile::kM] = ptx::load_acquire_gpu(in.ready + row / Tile::kM) + 1;\n",
        ),
    ),
    of_shrink(
        "publish_inside_only",
        "a warpgroup whose rows lie outside the matrix does not count",
        "the tiles of its row block wait for ever",
        (
            CALL,
            "    if (consumer.epilogue.thread == 0 && row + consumer_index * 64 < jobs.block.p.m) "
            "jobs.publish(row);\n",
        ),
    ),
    of_jobs(
        "flag_per_row_pair",
        "both blocks of a cluster count in the flag of their row pair, which is awaited as before",
        "two of the four parts suffice, and they may be the other block's",
        (PUBLISH, PUBLISH.replace("kM", "kPairM")),
        (
            "const uint32_t* ready = in.ready + row / Tile::kM;",
            "const uint32_t* ready = in.ready + row / Tile::kPairM;",
        ),
    ),
    of_shrink(
        "leave_publishing_when_outside",
        "a warp whose rows lie outside the matrix returns before the barrier of T",
        "the barrier waits for four warps",
        (
            BARRIER,
            "    if (consumer.epilogue.first_row({row, 0}, 0) >= jobs.block.p.m)"
            " return;\n" + BARRIER,
        ),
    ),
    Fault(
        "shared_memory_without_tickets",
        "the launch asks for shared memory up to the tickets",
        "they lie past the block's allocation",
        (
            (
                "gemm/sm90a/launch.h",
                "Tile::kThreads, JobTile<Tile>::kSharedBytes, false",
                "Tile::kThreads, Tile::kSharedBytes, false",
            ),
        ),
        program="lora_gemm_fused_shrink_sm90a",
    ),
]

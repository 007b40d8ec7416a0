"""Jobs that one thread draws for both blocks of a cluster."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    SCHEDULER_WAIT,
    SETUP_THREAD,
    TICKET_ARRIVE,
    TICKET_READ,
    TICKET_RELEASE,
    TICKET_STORE,
    TICKET_SYNC,
    TICKET_WAIT,
)

TICKETS = [
    Fault(
        "ticket_read_after_release",
        "the slot is released before the ticket is read",
        "the scheduler may write the next ticket into it",
        [(TICKET_READ, ""), (TICKET_SYNC, ""), (TICKET_RELEASE, TICKET_RELEASE + TICKET_READ)],
    ),
    Fault(
        "ticket_syncwarp_after_release",
        "the warp synchronises after its first lane has released the slot",
        "the other lanes may not have read the ticket yet",
        [(TICKET_SYNC, ""), (TICKET_RELEASE, TICKET_RELEASE + TICKET_SYNC)],
    ),
    Fault(
        "ticket_stored_before_empty",
        "the scheduler writes the ticket and awaits the empty slot before it arrives",
        "readers of the ticket before may not have read it",
        [
            (SCHEDULER_WAIT, ""),
            (TICKET_ARRIVE, SCHEDULER_WAIT.replace("      if", "        if", 1) + TICKET_ARRIVE),
        ],
    ),
    Fault(
        "ticket_arrive_before_store",
        "the scheduler arrives at the full barrier, then writes the ticket",
        "readers may come before the ticket",
        [(TICKET_STORE, ""), (TICKET_ARRIVE, TICKET_ARRIVE + TICKET_STORE)],
    ),
    Fault(
        "ticket_address_not_mapped",
        "the scheduler writes each block's ticket at its own shared address",
        "block 1's slot is never written",
        [
            (
                "ptx::map_shared(block.shared + Plan::kTicket + 4 * ring.slot, to);",
                "block.shared + Plan::kTicket + 4 * ring.slot;",
            )
        ],
    ),
    Fault(
        "ticket_released_to_own_rank",
        "block 1's readers release the slot at their own block's barrier",
        "the scheduler waits at that of block 0",
        [
            (
                "ptx::mbarrier_arrive_cluster(ticket_empty(ring.slot), 0);",
                "ptx::mbarrier_arrive_cluster(ticket_empty(ring.slot), rank);",
            )
        ],
    ),
    Fault(
        "ticket_waited_in_block_scope",
        "the ticket is awaited with the block's scope (try_wait without .cluster)",
        "the ticket is an ordinary store of another block's thread: the acquire's scope leaves it out",
        [(TICKET_WAIT, TICKET_WAIT.replace("mbarrier_wait_cluster", "mbarrier_wait"))],
    ),
    Fault(
        "ticket_waited_at_the_peer",
        "both blocks wait at block 0's full barrier and read block 0's ticket",
        "mbarrier.try_wait takes the block's own barriers only",
        [
            (
                TICKET_WAIT,
                TICKET_WAIT.replace(
                    "ticket_full(ring.slot)", "ptx::map_shared(ticket_full(ring.slot), 0)"
                ),
            ),
            (
                TICKET_READ,
                TICKET_READ.replace(
                    "shared + Plan::kTicket + 4 * ring.slot",
                    "ptx::map_shared(shared + Plan::kTicket + 4 * ring.slot, 0)",
                ),
            ),
        ],
    ),
    Fault(
        "ticket_reset_at_start",
        "the first cluster also sets the job counter to zero when it starts",
        "another cluster may have drawn a job already",
        [(SETUP_THREAD, SETUP_THREAD + "      if (blockIdx.x == 0) *p.ticket = 0;\n")],
    ),
    Fault(
        "tickets_over_a_barrier",
        "the tickets start in the last of the barriers",
        "an mbarrier object is accessed as an ordinary word",
        [
            (
                "kTicket = kTicketEmpty + 8 * kTickets;",
                "kTicket = kTicketEmpty + 8 * (kTickets - 1);",
            )
        ],
    ),
]

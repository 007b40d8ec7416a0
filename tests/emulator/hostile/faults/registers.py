"""Register budgets."""

from emulator.hostile.faults.fault import Fault
from emulator.hostile.faults.statements import (
    PRODUCER_DEC,
    SCHEDULE,
)

REGISTERS = [
    Fault(
        "dec_in_one_warp",
        "only the two producer warps with work give up registers",
        "setmaxnreg is a warpgroup's, and two warps return too few for the consumers",
        [(PRODUCER_DEC, "      if (block.warp < 2) ptx::setmaxnreg_dec<kProducerRegisters>();\n")],
    ),
    Fault(
        "dec_after_the_work",
        "the producer gives up its registers after it has produced",
        "the consumers wait for registers before they consume anything",
        [
            (PRODUCER_DEC, ""),
            (SCHEDULE, SCHEDULE + "    ptx::setmaxnreg_dec<kProducerRegisters>();\n"),
        ],
    ),
    Fault(
        "dec_in_consumers",
        "the consumers use setmaxnreg.dec to get more registers",
        "dec must name no more than the warp has",
        [
            (
                "      ptx::setmaxnreg_inc<kConsumerRegisters>();\n",
                "      ptx::setmaxnreg_dec<kConsumerRegisters>();\n",
            )
        ],
    ),
    Fault(
        "inc_to_fewer_than_at_launch",
        "the consumers' budget is 160, fewer than the 168 of the launch",
        "inc must name no fewer than the warp has",
        [("kConsumerRegisters = 232;", "kConsumerRegisters = 160;")],
    ),
]

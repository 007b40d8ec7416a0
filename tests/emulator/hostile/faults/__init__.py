"""A second list of faults in the clustered GEMM, drawn up from the kernel and the PTX ISA alone.

Unlike the fault sites in the source, which leave out or miscount one statement, these are edits of the text: statements
moved across each other, the wrong barrier, rank, scope or proxy, layouts that disagree. All are wrong on the hardware,
some only by the letter of the ISA; the controls at the end are legal and must raise no alarm.
"""

from emulator.hostile.faults.controls import CONTROLS
from emulator.hostile.faults.epilogue import EPILOGUE
from emulator.hostile.faults.fault import SOURCES, Fault
from emulator.hostile.faults.flag import FLAG
from emulator.hostile.faults.loads import LOADS
from emulator.hostile.faults.maps import MAPS
from emulator.hostile.faults.registers import REGISTERS
from emulator.hostile.faults.set_up_and_finish import SET_UP_AND_FINISH
from emulator.hostile.faults.tickets import TICKETS
from emulator.hostile.faults.wgmma import WGMMA

FAULTS = [
    *LOADS,
    *WGMMA,
    *REGISTERS,
    *FLAG,
    *TICKETS,
    *SET_UP_AND_FINISH,
    *EPILOGUE,
    *MAPS,
    *CONTROLS,
]

__all__ = ["FAULTS", "SOURCES", "Fault"]

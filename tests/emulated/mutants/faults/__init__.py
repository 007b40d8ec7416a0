"""Faults that are edits of the text. Each is wrong on the hardware, some only by the letter of the PTX ISA.

thought.py     what the rules cannot know
others         slips of a hand that writes such kernels: statements moved across each other, the
               wrong barrier, rank, scope or proxy, layouts that disagree
controls.py    legal edits, which must raise no alarm
"""

from emulator.mutants.faults.controls import CONTROLS
from emulator.mutants.faults.decode import DECODE
from emulator.mutants.faults.dequantize import DEQUANTIZE
from emulator.mutants.faults.epilogue import EPILOGUE
from emulator.mutants.faults.grouped import GROUPED
from emulator.mutants.faults.host import HOST
from emulator.mutants.faults.jobs import JOBS
from emulator.mutants.faults.loads import LOADS
from emulator.mutants.faults.maps import MAPS
from emulator.mutants.faults.mask import MASK
from emulator.mutants.faults.products import PRODUCTS
from emulator.mutants.faults.set_up import SET_UP
from emulator.mutants.faults.thought import THOUGHT

FAULTS = [
    *(*THOUGHT, *LOADS, *PRODUCTS, *JOBS, *SET_UP, *EPILOGUE, *MASK, *MAPS, *HOST, *GROUPED),
    *(*DECODE, *DEQUANTIZE, *CONTROLS),
]

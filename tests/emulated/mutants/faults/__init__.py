"""Faults that are edits of the text. Each is wrong on the hardware, some only by the letter of the PTX ISA.

thought.py     what the rules cannot know
devices.py     what belongs to one of several devices or streams
others         slips of a hand that writes such kernels: statements moved across each other, the
               wrong barrier, rank, scope or proxy, layouts that disagree
controls.py    legal edits, which must raise no alarm
"""

from emulated.mutants.faults.controls import CONTROLS
from emulated.mutants.faults.decode import DECODE
from emulated.mutants.faults.dequantize import DEQUANTIZE
from emulated.mutants.faults.devices import DEVICES
from emulated.mutants.faults.epilogue import EPILOGUE
from emulated.mutants.faults.experts import EXPERTS
from emulated.mutants.faults.grouped import GROUPED
from emulated.mutants.faults.host import HOST
from emulated.mutants.faults.loads import LOADS
from emulated.mutants.faults.maps import MAPS
from emulated.mutants.faults.mask import MASK
from emulated.mutants.faults.products import PRODUCTS
from emulated.mutants.faults.set_up import SET_UP
from emulated.mutants.faults.slots import SLOTS
from emulated.mutants.faults.thought import THOUGHT

FAULTS = [
    *(*THOUGHT, *LOADS, *PRODUCTS, *SET_UP, *EPILOGUE, *MASK, *MAPS, *HOST, *GROUPED),
    *(*EXPERTS, *DECODE, *DEQUANTIZE, *SLOTS, *DEVICES, *CONTROLS),
]

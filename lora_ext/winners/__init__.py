"""Autotune cache: which route of `lora_linear` was fastest on this card, for which layers.

`lora_ext.warmup` times the routes and stores the winners in a file of the user's cache, which
`import lora_ext` reads. The planner uses them for a call whose layer was timed with at least half
and at most twice the rows, and otherwise its prediction. `load_winners` pins a file.

    python -m lora_ext.winners --layer 4096x4096 --layer 4096x14336 --rank 16 --rows 2048

does the same from a shell. The package contains tables of measured cards in
`lora_ext/winners/measured`.
"""

from .session import Warmup, warmup
from .shape import Shape, shapes_of
from .table import Entry, Table, TableError, read_table, write_table
from .tables import load_cached, load_winners, table_path, user_folder

__all__ = [
    "Entry",
    "Shape",
    "Table",
    "TableError",
    "Warmup",
    "load_cached",
    "load_winners",
    "read_table",
    "shapes_of",
    "table_path",
    "user_folder",
    "warmup",
    "write_table",
]

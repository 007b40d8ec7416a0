"""Measured dispatch: time the routes of `lora_linear` on this card and let the planner know.

    python -m lora_ext.tune --layer 4096x4096 --layer 4096x14336 --rank 16 --rows 2048

times every route that can compute a layer, forward and backward apart, and keeps the fastest in a
file of the user's cache, which `import lora_ext` reads. The planner goes by it wherever a call's
layer was timed with at least half and at most twice the rows; elsewhere by its own rule. Tables of
cards that were measured come with the package, in `lora_ext/tune/measured`.
"""

from .shape import Shape, shapes_of
from .table import Entry, Table, TableError, read_table, write_table
from .tables import load_tables, table_path, user_folder
from .trial import tune

__all__ = [
    "Entry",
    "Shape",
    "Table",
    "TableError",
    "load_tables",
    "read_table",
    "shapes_of",
    "table_path",
    "tune",
    "user_folder",
    "write_table",
]

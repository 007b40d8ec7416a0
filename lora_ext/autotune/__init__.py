"""Autotune cache: which route of `lora_linear` was fastest on this card, for which layers.

`lora_ext.warmup` times the routes and writes the fastest to a file of the user's cache, which
`import lora_ext` reads. The planner uses them for a call whose layer was timed with at least half
and at most twice the rows, and otherwise its prediction. `load_cache` reads one file instead: so
all ranks of a training make the same choices.
"""

from .cache_file import Cache, CacheError, Entry, read_cache, write_cache
from .planner_cache import load_cache
from .session import Warmup, warmup
from .shape import Shape, shapes_of

__all__ = [
    "Cache",
    "CacheError",
    "Entry",
    "Shape",
    "Warmup",
    "load_cache",
    "read_cache",
    "shapes_of",
    "warmup",
    "write_cache",
]

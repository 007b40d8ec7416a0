"""Autotune cache: which route of `lora_linear` was fastest on this card, for which layers.

`lora_ext.warmup` times the routes and writes the fastest to a file of the user's cache, which
`import lora_ext` reads. The planner uses them for a call whose layer was timed with at least half
and at most twice the rows, and otherwise its prediction. `pin_cache` pins a file.
"""

from .cache_file import Cache, CacheError, Entry, read_cache, write_cache
from .planner_cache import cache_path, load_cached, pin_cache, user_folder
from .session import Warmup, warmup
from .shape import Shape, shapes_of

__all__ = [
    "Cache",
    "CacheError",
    "Entry",
    "Shape",
    "Warmup",
    "cache_path",
    "load_cached",
    "pin_cache",
    "read_cache",
    "shapes_of",
    "user_folder",
    "warmup",
    "write_cache",
]

"""Many adapters of one model in tensors of fixed size, to be served and trained."""

from .pool import AdapterPool

__all__ = ["AdapterPool"]

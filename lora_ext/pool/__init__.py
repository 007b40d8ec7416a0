"""Many adapters of one model in tensors of fixed size, for serving and training."""

from .pool import AdapterPool

__all__ = ["AdapterPool"]

"""Folders of models whose weights stay as they are stored, for transformers' `from_pretrained`."""

from .packed import packed_config

__all__ = ["packed_config"]

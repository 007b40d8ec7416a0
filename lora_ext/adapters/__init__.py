"""Adapters on disk, in the folder format of PEFT: ``adapter_config.json`` and
``adapter_model.safetensors``."""

from .errors import AdapterError
from .load import load_adapter, read_adapter_config
from .peft_config import AdapterConfig
from .save import save_adapter

__all__ = ["AdapterConfig", "AdapterError", "load_adapter", "read_adapter_config", "save_adapter"]

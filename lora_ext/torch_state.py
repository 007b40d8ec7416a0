"""The state of torch for the current call: autocast, tracing, transforms, tensor subclasses.

All names of torch that are not public stand here (a test looks for others).
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint


def _private(path: str) -> Any:
    """A name of torch that is not public.

    Raises:
        ImportError: this torch lacks it.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ImportError(
            f"lora_ext: expected a torch that has {path}, but torch {torch.__version__} has not; "
            "install one that docs/compatibility.md names, then lora_ext again"
        ) from None


FakeTensor = _private("torch._subclasses.fake_tensor.FakeTensor")
# The number of the backward that is running in this thread, -1 outside of one.
graph_task = _private("torch._C._current_graph_task_id")
# The innermost transform of torch.func, None outside of them.
transforms = _private("torch._C._functorch.peek_interpreter_stack")
dispatch_modes = _private("torch._C._len_torch_dispatch_stack")
disabled_modes = _private("torch.utils._python_dispatch._disable_current_modes")
has_any_global_hook = _private("torch.nn.modules.module._has_any_global_hook")
_private("torch.autograd.forward_ad._current_level")  # a number that changes: read where it stands
# The two kinds of checkpoint keep the function that they repeat: `forward(ctx, function, ...)` of
# one, the constructor of the other. Where a torch lacks them, a mixed batch that is repeated is an
# error in backward: `current_row_adapters`.
checkpoint_function: Any = getattr(checkpoint, "CheckpointFunction", None)
checkpoint_frame: Any = getattr(checkpoint, "_CheckpointFrame", None)

_is_compiling = torch.compiler.is_compiling
_tracing_state = _private("torch._C._get_tracing_state")


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a plain tensor: not a DTensor, not a quantised subclass."""
    kind = type(tensor)
    return kind is nn.Parameter or kind is Tensor or issubclass(kind, FakeTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


def is_transformed() -> bool:
    """Whether the op would raise an error in this call, which needs torch's own derivatives."""
    if torch.compiler.is_compiling():
        return False
    return transforms() is not None or is_forward_ad()


def is_forward_ad() -> bool:
    """Whether torch.autograd.forward_ad computes derivatives along with the call."""
    return forward_ad._current_level >= 0


def is_onnx_export() -> bool:
    """Whether torch.onnx.export is tracing; ONNX has no operator for the op."""
    # torch's own check for ONNX costs microseconds; each exporter traces in one of two ways.
    return is_traced() and torch.onnx.is_in_onnx_export()


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace is tracing the call."""
    return torch.compiler.is_exporting() or _tracing_state() is not None


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is tracing the call."""
    return _is_compiling() or _tracing_state() is not None


def outside_inference() -> AbstractContextManager:
    """Tensors that are made within the block can be saved for backward, in inference mode, too."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or the dtype to which autocast will cast it."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; never for the meta device, which has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is captured, in which nothing of x can be read on the host."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()

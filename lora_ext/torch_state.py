"""The state of torch for the current call: autocast, tracing, transforms, tensor subclasses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state


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
    if peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def is_onnx_export() -> bool:
    """Whether torch.onnx.export is tracing; ONNX has no operator for the op."""
    # torch's own check for ONNX costs microseconds; each exporter traces in one of two ways.
    return is_traced() and torch.onnx.is_in_onnx_export()


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

"""The tensors of a model: which module holds them, and whether they can be written."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .errors import AdapterError


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inside = model._modules.get("_orig_mod")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


def check_real(what: str, tensor: Tensor) -> None:
    """Raises AdapterError for a tensor that cannot be written as a whole."""
    if tensor.is_meta or is_sharded(tensor):
        state = "on the meta device" if tensor.is_meta else "sharded"
        raise AdapterError(
            f"expected {what} to be a whole tensor with values, but it is {state}; load adapters "
            "after the weights and before sharding"
        )


def bias_of(module: nn.Module) -> Tensor | None:
    """The tensor that ``module.state_dict()`` has as "bias"."""
    if "bias" in module._non_persistent_buffers_set:
        return None
    return dict(tensors_of(module)).get("bias")


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the parameters and buffers that the module itself holds."""
    for table in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in table.items() if tensor is not None)

"""Which tensors of a model belong to which adapter, and which are shared."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..models.model import BIAS_SAVED_BY, SAVED_BY, named_modules, saved_modules
from .errors import AdapterError, shown


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


class Owners:
    """Which modules hold each tensor of a model, and which adapter has stored it."""

    def __init__(self, model: nn.Module) -> None:
        self.holders: dict[int, list[tuple[str, nn.Module]]] = {}
        self.claims: dict[int, str] = {}
        for path, module in named_modules(model):
            for name, tensor in tensors_of(module):
                full = f"{path}.{name}" if path else name
                self.holders.setdefault(id(tensor), []).append((full, module))
            names = getattr(module, BIAS_SAVED_BY, ())
            bias = bias_of(module)
            if names and bias is not None:
                self.claims[id(bias)] = names[0]
        for _, root in saved_modules(model):
            for module in root.modules():
                for _, tensor in tensors_of(module):
                    self.claims[id(tensor)] = getattr(root, SAVED_BY)[0]

    def check_free(self, key: str, tensor: Tensor) -> None:
        """Raises AdapterError if another adapter has stored values in the tensor."""
        if id(tensor) in self.claims:
            raise AdapterError(
                f"expected {shown(key, 200)} to be free, but adapter {self.claims[id(tensor)]!r} "
                "has other values there; the model has room for one"
            )

    def tied(self, tensor: Tensor, writers: set[int]) -> list[str]:
        """The names of the tensor in modules other than those with these ids."""
        return [name for name, module in self.holders[id(tensor)] if id(module) not in writers]

"""Over: a module whose class is made for the class of the module that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Over(nn.Module):
    """Base class of a module that takes over all that another one is, not only weight and bias.

    Its class is made at run time and also derives from the other's, whose methods so find what
    they read; it shares the other's tensors, mode and hooks.

    Attributes:
        kind: the class of this package from which the module's class derives.
        base_type: the class of the module that it replaces.
    """

    kind: type[Any]
    base_type: type[nn.Module]
    # Names of what the module has besides what the base has.
    own_names: ClassVar[frozenset[str]] = frozenset(("base_type",))

    @classmethod
    def class_over(cls, base_type: type[nn.Module]) -> type[Any]:
        """The class of the modules that replace this one, made once for each."""
        found = _classes.get((cls, base_type))
        if found is None:
            words = {"__module__": cls.__module__, "__doc__": cls.__doc__, "kind": cls}
            made = type(cls._name_over(base_type), (cls, base_type), words)
            found = _classes.setdefault((cls, base_type), made)
        return found

    @classmethod
    def _name_over(cls, base_type: type[nn.Module]) -> str:
        return f"LoRA{base_type.__name__}"

    def _adopt(self, base: nn.Module) -> None:
        self.__dict__.update(base.__dict__)
        for table in _TABLES:
            self.__dict__[table] = base.__dict__[table].copy()

    def restored(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A module of the class that was replaced, with its parameters or merged ones.

        Args:
            weights: parameter's name -> the tensor to use instead.
        """
        base = self.base_type.__new__(self.base_type)
        nn.Module.__init__(base)
        own = self.own_names
        base.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        for table in _TABLES:
            kept = base.__dict__[table] = self.__dict__[table].copy()
            for name in own.intersection(kept):
                kept.discard(name) if isinstance(kept, set) else kept.pop(name)
        for name, weight in (weights or {}).items():
            base._parameters[name] = nn.Parameter(weight, requires_grad=False)
        return base

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name.
        return empty_over, (self.kind, self.base_type), self.__getstate__()


_classes: dict[tuple[type, type], type[Any]] = {}


def empty_over(kind: type[Any], base_type: type[nn.Module]) -> Any:
    """An empty module of the class made for the base's class."""
    found = kind.class_over(base_type)
    module = found.__new__(found)
    nn.Module.__init__(module)
    module.base_type = base_type
    return module


def check_own_forward(where: str, base: nn.Module) -> None:
    """Raises TypeError for a module whose forward is replaced on the instance."""
    if "forward" in base.__dict__:
        raise TypeError(
            f"{where}: expected a plain {type(base).__name__}, but its forward was replaced, as "
            "by hooks; remove them first (those of Hugging Face's accelerate: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )

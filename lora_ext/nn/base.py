"""LoRALayer: named adapters on a frozen base layer, whatever the base computes.

The base's own parameters keep their names (``weight``, ``bias``) and are never written, so that the
base's checkpoints load unchanged and `unmerge` has nothing to undo. Around them stand

    adapters      name -> AdapterSpec
    lora_a        name -> [r, in]         lora_a_init   name -> [r, in]    (PiSSA and OLoRA)
    lora_b        name -> [out, r]        lora_b_init   name -> [out, r]
    lora_bias     name -> [out]           (where the spec has lora_bias)

PiSSA and OLoRA start from factors of the weight. Their authors take the initial product out of the
weight; here the weight stays and the layer computes W + s (B A - B0 A0), a product of rank 2 r, so
that any number of them can be added, switched, merged and deleted, and a bfloat16 weight is not
rounded a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import initialize
from .adapter_spec import MAX_RANK, AdapterSpec
from .merging import merged_tensors
from .row_adapters import RowAdapters, forget, in_force

# Each forward of a layer takes one of these; `path` says which and why.
PATHS = ("fused", "packed", "library", "merged", "added", "base")


class LoRALayer(nn.Module):
    """Base class of the layers; a subclass also derives from the nn.Module that it replaces.

    Attributes:
        adapters: name -> `AdapterSpec`, in the order in which they were added.
        active_adapters: names whose updates are added, a tuple.
        merged_adapters: names that the merged weight holds, () when it is not merged.
    """

    weight: Any  # a Parameter, as the base declares it
    bias: Any
    merged_weight: Tensor | None
    merged_bias: Tensor | None
    # What a block of `use_adapters` gives the layer, on the instance while it is open.
    row_adapters: Any = None

    def _init_lora(self, base: nn.Module | None = None) -> None:
        """Call after the base's own constructor, or with the module that is replaced."""
        kept = self.__dict__ if base is None else base.__dict__
        self.base_attributes = {k: v for k, v in kept.items() if k not in nn.Module().__dict__}
        self.base_type = self._own_base() if base is None else type(base)
        if base is not None:
            self._adopt(base)
        self.adapters: dict[str, AdapterSpec] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.merged_adapters: tuple[str, ...] = ()
        # The layer's part of an `AdapterPool`, a `LayerPool`.
        self.pool: Any = None
        # One entry for each block of disable_adapters that is open, in whatever thread.
        self._disabled: list[None] = []
        self.lora_a = nn.ParameterDict()
        # Never called, but seen: nn.TransformerEncoderLayer reads linear1.weight itself, past the
        # adapters, unless a module within has a hook.
        self.lora_a.register_forward_pre_hook(_unused_hook)
        self.lora_b = nn.ParameterDict()
        self.lora_bias = nn.ParameterDict()
        self.lora_a_init = nn.ParameterDict()
        self.lora_b_init = nn.ParameterDict()
        # Caches, not state: absent from state dicts, carried by .to(), copies and pickles.
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    # What a subclass says of its base.

    def matrix(self, weight: Tensor) -> Tensor:
        """The ``[out, in]`` view of a tensor that is laid out as ``self.weight``."""
        raise NotImplementedError

    @property
    def stored_weight(self) -> Tensor:
        """What the base keeps of its weight; its device is that of the adapters."""
        return self.weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the base's product."""
        out_features, in_features = self.matrix(self.weight).shape
        return out_features, in_features

    def weight_values(self) -> Tensor:
        """The weight ``[out, in]`` for an init that starts from it."""
        return self.matrix(self.weight.detach())

    def factor_dtype(self, wanted: torch.dtype | None = None) -> torch.dtype:
        """That of an adapter for which `wanted` is None: float32, on a float64 weight float64."""
        if wanted is not None:
            return wanted
        return torch.float64 if self.stored_weight.dtype == torch.float64 else torch.float32

    def factor_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_a and lora_b as they are stored."""
        out_features, in_features = self.matrix_shape
        return (r, in_features), (out_features, r)

    def initialize(self, name: str) -> None:
        """Gives the adapter its first values, by its spec's init."""
        spec, lora_a, lora_b = self.adapters[name], self.lora_a[name], self.lora_b[name]
        if spec.init == "kaiming":
            initialize.kaiming_(lora_a, lora_b)
        elif spec.init == "gaussian":
            initialize.gaussian_(lora_a, lora_b, spec.r)
        else:
            factors = initialize.pissa if spec.init == "pissa" else initialize.olora
            first_a, first_b = factors(self.weight_values(), spec)
            with torch.no_grad():
                for table, first in ((self.lora_a, first_a), (self.lora_b, first_b)):
                    table[name].copy_(first)
            self._freeze_init(name)

    def spec_of(self, name: str) -> AdapterSpec | None:
        """The spec of one of the layer's adapters or of its pool's, None if there is none."""
        spec = self.adapters.get(name)
        if spec is None and self.pool is not None and name in self.pool:
            return self.pool.specs[name]
        return spec

    def rank(self, name: str) -> int:
        """R of `factors`: what the adapter costs."""
        if name not in self.adapters and self.pool is not None:
            return self.pool.specs[name].r
        return self.lora_a[name].shape[0] * (2 if name in self.lora_a_init else 1)

    def row_names(self, rows: RowAdapters) -> list[str]:
        """The adapters of a block of `use_adapters` that the layer has."""
        own, pooled = self.adapters, self.pool
        if pooled is None:
            return [name for name in rows.names if name in own]
        specs, names = pooled.specs, pooled.names
        return [n for n in rows.names if n in own or (n in specs and n in names)]

    def check_unmerged(self) -> None:
        """Raises RuntimeError for a merged layer, whose weight is the same for every row."""
        if self.merged_adapters:
            raise RuntimeError(
                f"lora_ext.use_adapters: expected adapters that are not merged, but a "
                f"{type(self).__name__} has {list(self.merged_adapters)} merged into its weight, "
                "for every row; unmerge first"
            )

    def _freeze_init(self, name: str) -> None:
        """Keeps the present factors as those to subtract."""
        for table, kept in ((self.lora_a, self.lora_a_init), (self.lora_b, self.lora_b_init)):
            kept[name] = nn.Parameter(table[name].detach().clone(), requires_grad=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A ``[R, in]``, B ``[out, R]``) with delta W = scaling * B A; R = r, or 2 r for PiSSA."""
        if name not in self.adapters and self.pool is not None:
            return self.pool.slots[name]
        lora_a, lora_b = self.lora_a[name], self.lora_b[name]
        if name in self.lora_a_init:
            lora_a = torch.cat([lora_a, self.lora_a_init[name]])
            lora_b = torch.cat([lora_b, -self.lora_b_init[name]], dim=1)
        return lora_a, lora_b

    # Adapters by name.

    def add_adapter(self, name: str, spec: AdapterSpec, dtype: torch.dtype | None = None) -> None:
        """Adds an adapter and freezes the weight. One that is alone becomes active and trainable.

        Args:
            name: without dots; it is part of the state dict's keys.
            spec: rank, alpha and so on.
            dtype: of the factors; None is float32 on a half weight, else the weight's.

        Raises:
            ValueError: the name is taken or cannot be used, the rank does not fit, or a merge or
                init needs values that the weight does not have (meta device).
            RuntimeError: the weight is sharded over processes.
        """
        self.check_whole("add_adapter")
        self._check_new(name, spec)
        weight = self.stored_weight
        like: dict[str, Any] = {"dtype": self.factor_dtype(dtype), "device": weight.device}
        with torch.inference_mode(False):  # parameters must be able to train later
            shape_a, shape_b = self.factor_shapes(spec.r)
            lora_a, lora_b = torch.empty(shape_a, **like), torch.empty(shape_b, **like)
            try:
                self.adapters[name] = spec
                self.lora_a[name], self.lora_b[name] = nn.Parameter(lora_a), nn.Parameter(lora_b)
                if spec.lora_bias:
                    out_features = self.matrix_shape[0]
                    self.lora_bias[name] = nn.Parameter(torch.zeros(out_features, **like))
                self.initialize(name)
            except BaseException:  # an interrupt too leaves no half-made adapter
                self._remove(name)
                raise
        weight.requires_grad_(False)
        is_alone = len(self.adapters) == 1
        self._set_trainable(name, is_alone)
        if is_alone:
            self.active_adapters = (name,)

    def _check_new(self, name: str, spec: AdapterSpec) -> None:
        where = f"lora_ext.nn.{type(self).__name__}.add_adapter"
        # ParameterDict keeps entries as attributes: "keys" would hide its method.
        if not name or "." in name or hasattr(nn.ParameterDict(), name):
            raise ValueError(
                f"{where}: expected a name that is not empty, has no dot and is no attribute of "
                f"nn.ParameterDict, but got {name!r}"
            )
        if name in self.adapters or (self.pool is not None and name in self.pool.names):
            raise ValueError(
                f"{where}: {name!r} exists already; delete_adapter it first or choose another name"
            )
        self._check_weight(where)
        if spec.subtracts_init:
            limit = min(*self.matrix_shape, MAX_RANK // 2)
            if spec.r > limit:
                raise ValueError(
                    f"{where}: init {spec.init!r} takes r columns of the weight's factors and "
                    f"needs rank 2 r: expected r of at most {limit}, but got {spec.r}"
                )
            if self.stored_weight.is_meta:
                raise ValueError(
                    f"{where}: init {spec.init!r} needs the weight's values, but the weight is on "
                    "the meta device; load it first"
                )
            if spec.init == "pissa" and spec.scaling <= 0:
                raise ValueError(
                    f"{where}: init 'pissa' divides by the scaling: expected alpha above 0, but "
                    f"got {spec.alpha}"
                )

    def _check_weight(self, where: str) -> None:
        """Raises ValueError for a weight beside which there can be no adapter."""
        if not self.weight.is_floating_point():
            raise ValueError(f"{where}: expected a floating weight, but got {self.weight.dtype}")

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; if it was active the others stay so, if it was merged, unmerges.

        Raises:
            ValueError: no adapter has this name.
            RuntimeError: the weight is sharded over processes.
        """
        self._known(name, "delete_adapter")
        self.check_whole("delete_adapter")
        forget(self, name)
        if name in self.merged_adapters:
            self.unmerge()
        self.active_adapters = tuple(active for active in self.active_adapters if active != name)
        self._remove(name)

    def check_whole(self, method: str) -> None:
        """Raises RuntimeError if the weight is sharded over processes."""
        # FSDP keeps a list of parameters of its own: it would neither shard nor average a new one,
        # and would put a deleted one back.
        if hasattr(self.stored_weight, "full_tensor"):
            raise RuntimeError(
                f"lora_ext.nn.{type(self).__name__}.{method}: expected a whole weight, but it is "
                f"sharded (DTensor); {method} before fully_shard"
            )

    def _remove(self, name: str) -> None:
        self.adapters.pop(name, None)
        for table in self.tables().values():
            if name in table:
                del table[name]

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Makes exactly these adapters active and trainable; their updates add up.

        A weight merged from any other is unmerged.

        Raises:
            ValueError: no adapter has one of the names, or a name comes twice.
        """
        names = self._known(names, "set_adapter")
        if not set(self.merged_adapters) <= set(names):
            self.unmerge()
        self.active_adapters = names
        for name in self.adapters:
            self._set_trainable(name, name in names)

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for table in (self.lora_a, self.lora_b, self.lora_bias):
            if name in table:
                table[name].requires_grad_(trainable)

    def _known(self, names: str | Iterable[str], method: str) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        unknown = [name for name in names if name not in self.adapters]
        if unknown or len(set(names)) != len(names):
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}.{method}: expected distinct names out of "
                f"{list(self.adapters)}, but got {list(names)}"
            )
        return names

    def tables(self) -> dict[str, nn.ParameterDict]:
        """All that belongs to adapters: attribute name -> ParameterDict by adapter."""
        names = ("lora_a", "lora_b", "lora_bias", "lora_a_init", "lora_b_init")
        return {name: getattr(self, name) for name in names}

    # Merging.

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    def merge(self, names: str | Iterable[str] | None = None) -> None:
        """Computes W + sum of scaling * B A in float32 beside W, and uses it from now on.

        What the layer computes stays the same: active adapters that are not merged are added to the
        merged weight's product. W is kept, so `unmerge` is exact; the price is a second weight in
        memory (`lora_ext.models.merge_and_unload` keeps one). The merged weight is a snapshot:
        merge again after the adapters change. ``train()`` and loading a state dict unmerge. No
        gradient reaches an adapter that is merged.

        Args:
            names: active adapters; None merges all of them.

        Raises:
            ValueError: a name is unknown, comes twice, or is not active.
            RuntimeError: an update is not finite, or the weight is sharded; nothing is changed.
        """
        names = self.active_adapters if names is None else self._known(names, "merge")
        self.check_active(names)
        self.install_merged(*self.compute_merged(names))

    def check_active(self, names: Iterable[str], at: str = "") -> None:
        """Raises ValueError for names that `merge` would add to what the layer computes."""
        inactive = [name for name in names if name not in self.active_adapters]
        if inactive:
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}.merge: expected active adapters, which are "
                f"{list(self.active_adapters)}, but got {inactive}{at}; call set_adapter first"
            )

    def compute_merged(
        self, names: str | Iterable[str] | None = None
    ) -> tuple[tuple[str, ...], Tensor | None, Tensor | None]:
        """(names, weight, bias) for `install_merged`; changes nothing."""
        names = self._known(self.active_adapters if names is None else names, "merge")
        weight, bias = merged_tensors(self, names) if names else (None, None)
        return names, weight, bias

    def install_merged(
        self, names: tuple[str, ...], weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Puts tensors of `compute_merged` in place; cannot fail."""
        self.merged_adapters = names
        self.merged_weight, self.merged_bias = weight, bias

    def unmerge(self) -> None:
        """Drops the merged weight. W was never written: it has the bits it always had."""
        self.install_merged((), None, None)

    @property
    def adapters_enabled(self) -> bool:
        """False within a block of `disable_adapters`."""
        return not self._disabled

    @contextmanager
    def disable_adapters(self) -> Any:
        """Within the block the layer computes its base alone, merged or not, for all threads.

        Blocks may overlap; the adapters are back when the last one is left.
        """
        self._disabled.append(None)
        try:
            yield self
        finally:
            self._disabled.pop()

    # What a forward does.

    def path(self, rows: int | None = None) -> tuple[str, str]:
        """(one of `PATHS`, the reason) of the next forward.

        Args:
            rows: rows of x flattened to ``[rows, in]``, which choose the kernel; None for many.
        """
        rows_of_block = self.adapters_of_rows()
        if not self.adapters and rows_of_block is None:
            return "base", "no adapter" if self.pool is None else self._pool_reason()
        if not self.adapters_enabled:
            return "base", "adapters are disabled"
        if rows_of_block is not None:
            return self._mixed_path(rows, rows_of_block)
        merged = f"merged: {', '.join(self.merged_adapters)}" if self.merged else ""
        if self.computes_base:
            return ("merged", merged) if merged else ("base", "no adapter is active")
        path, reason = self._adapted_path(rows)
        return path, f"{reason}; {merged}" if merged else reason

    def _adapted_path(self, rows: int | None) -> tuple[str, str]:
        raise NotImplementedError

    def _mixed_path(self, rows: int | None, block: RowAdapters) -> tuple[str, str]:
        """`path` within a block of `use_adapters`."""
        self.check_unmerged()
        names = self.row_names(block)
        if not names:
            return "base", "none of the adapters that rows have is in this layer"
        return self._path_of_rows(names), f"each row its own adapter, {len(names)} in this batch"

    def workspace_bytes(self) -> int:
        """What a forward needs for a weight that is dequantised for it."""
        return 0

    def _pool_reason(self) -> str:
        used, capacity = len(self.pool.names), len(self.pool.ranks)
        return f"a pool of {capacity} adapters, {used} of them used, in blocks of use_adapters"

    def _path_of_rows(self, names: Sequence[str]) -> str:
        return "library"

    def adapters_of_rows(self) -> RowAdapters | None:
        """The block of `use_adapters` that counts for a forward now, if one is open."""
        return None if self.row_adapters is None else in_force(self)

    @property
    def added_adapters(self) -> tuple[str, ...]:
        """The active adapters that the merged weight does not hold."""
        if not self.merged_adapters:
            return self.active_adapters
        return tuple(name for name in self.active_adapters if name not in self.merged_adapters)

    @property
    def computes_base(self) -> bool:
        """Whether a forward is that of the base, with the merged weight if there is one."""
        return bool(self._disabled) or not self.added_adapters

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the base's product: the merged ones, if they are to be used."""
        if self.merged_weight is None or self._disabled:
            return self.weight, self.bias
        return self.merged_weight, self.bias if self.merged_bias is None else self.merged_bias

    # nn.Module's own.

    def train(self, mode: bool = True) -> LoRALayer:
        """As nn.Module's; training mode unmerges, since merged adapters get no gradient."""
        if mode and self.merged:
            self.unmerge()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """The layer without an adapter in the place of `base`.

        It shares the parameters (no copy), the mode and the dictionaries of hooks, so that handles
        held elsewhere still remove their hooks.

        Raises:
            TypeError: base is of another class (a subclass may compute something else), or it is
                changed: weight_norm, a forward on the instance (accelerate), parameters, buffers or
                modules of the caller's, hooks on its state dict.
            ValueError: base has a setting that the layer has not.
        """
        cls._check_base(base)
        where = f"lora_ext.nn.{cls.__name__}: expected a plain {type(base).__name__}, but"
        if "weight" not in base._parameters:
            raise TypeError(f"{where} its weight is computed from others; remove that first")
        if "forward" in base.__dict__:
            raise TypeError(f"{where} its forward is replaced on the instance; remove that first")
        others = [*(set(base._parameters) - {"weight", "bias"}), *base._buffers, *base._modules]
        if others:
            raise TypeError(f"{where} it holds {sorted(others)} too, which would be lost")
        if any(base.__dict__[name] for name in _STATE_DICT_HOOK_TABLES):
            raise TypeError(f"{where} it has hooks on its state dict, which would be lost")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init_lora(base)
        return layer

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        """Raises TypeError or ValueError for what `around` cannot replace."""
        if type(base) is not cls._own_base():
            raise TypeError(
                f"lora_ext.nn.{cls.__name__}: expected exactly {cls._own_base().__name__}, but got "
                f"{type(base).__module__}.{type(base).__qualname__}"
            )

    @classmethod
    def _own_base(cls) -> type[nn.Module]:
        """The nn.Module that the class is a drop-in for."""
        return next(kind for kind in cls.__mro__ if kind.__module__.startswith("torch.nn."))

    def _adopt(self, base: nn.Module) -> None:
        self.__dict__.update(self.base_attributes)
        self.register_parameter("weight", base._parameters["weight"])
        if "bias" in base._parameters:
            self.register_parameter("bias", base._parameters["bias"])
        self.training = base.training
        for name in _HOOK_TABLES:
            self.__dict__[name] = base.__dict__[name]

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module of the class that was replaced, with this weight and bias, frozen."""
        base = self.base_type.__new__(self.base_type)
        nn.Module.__init__(base)
        base.__dict__.update(self.base_attributes)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            if name == "weight" or tensor is not None or "bias" in self._parameters:
                base.register_parameter(name, tensor)
        base.training = self.training
        for name in _HOOK_TABLES:
            base.__dict__[name] = self.__dict__[name]
        return base

    def restored(self) -> nn.Module:
        """A module of the class that was replaced, with the weight and bias that it had."""
        return self.as_base(self.weight, self.bias)

    def extra_repr(self) -> str:
        shown = [
            f"{name}{'' if name in self.active_adapters else ' (inactive)'}: r={spec.r}, "
            f"alpha={spec.alpha:g}, dropout={spec.dropout:g}"
            for name, spec in self.adapters.items()
        ]
        return ", ".join([super().extra_repr(), f"adapters={{{'; '.join(shown)}}}"])

    def __repr__(self) -> str:
        # On one line, like the layer that it replaces, without the tables of parameters.
        return f"{type(self).__name__}({self.extra_repr()})"


_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_DICT_HOOK_TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _unused_hook(module: nn.Module, args: Any) -> None:
    """Of a ParameterDict, which nobody calls."""

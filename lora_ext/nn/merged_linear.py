"""LoRAMergedLinear: one weight for several projections, each with its own factors or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .adapter_spec import MAX_RANK, AdapterSpec
from .linear import LoRALinear


class LoRAMergedLinear(LoRALinear):
    """loralib's MergedLinear: out_features are G equal groups, such as Q, K and V.

        y[group] = x W[group]^T + scaling * (drop(x) lora_a[group]^T) lora_b[group]^T

    with an update for the E groups that ``enable_lora`` enables. The factors are stored as in
    loralib: lora_a ``[E r, in]``, lora_b ``[E out / G, r]``. A forward is one call of the fused op
    with the factors ``[E r, in]`` and ``[out, E r]``; the second has a block for each group.

    Make it with `enable_groups` around a layer that has no adapter yet, or by
    `lora_ext.loralib.convert_loralib`.
    """

    enable_lora: tuple[bool, ...] = (True,)

    def enable_groups(self, enable_lora: Sequence[bool]) -> None:
        """Sets which groups have an update; to be called before the first adapter is added.

        Raises:
            ValueError: there is an adapter, the number of groups does not divide out_features, or
                none is enabled.
        """
        if self.adapters:
            raise ValueError(
                "lora_ext.nn.LoRAMergedLinear.enable_groups: expected a layer without adapters, "
                f"whose shapes depend on the groups, but got {list(self.adapters)}; delete them "
                "first"
            )
        enable = tuple(map(bool, enable_lora))
        if not any(enable) or self.out_features % len(enable):
            raise ValueError(
                "lora_ext.nn.LoRAMergedLinear: expected enable_lora with at least one True and a "
                f"length that divides out_features = {self.out_features}, but got {list(enable)}"
            )
        self.enable_lora = enable

    def _check_new(self, name: str, spec: AdapterSpec) -> None:
        super()._check_new(name, spec)
        where, enabled = "lora_ext.nn.LoRAMergedLinear.add_adapter", sum(self.enable_lora)
        if spec.subtracts_init:
            raise ValueError(
                f"{where}: init {spec.init_lora_weights!r} is for layers with one group only"
            )
        if spec.r * enabled > MAX_RANK:
            raise ValueError(
                f"{where}: expected r times the {enabled} enabled groups to be at most {MAX_RANK}, "
                f"but got r = {spec.r}"
            )

    def factor_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        groups, enabled = len(self.enable_lora), sum(self.enable_lora)
        return (enabled * r, self.in_features), (self.out_features // groups * enabled, r)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self.lora_a[name], self.lora_b[name]
        groups, enabled = len(self.enable_lora), sum(self.enable_lora)
        r, height = lora_b.shape[1], self.out_features // groups
        places = [group for group, enable in enumerate(self.enable_lora) if enable]
        dense = lora_b.new_zeros(self.out_features, enabled * r)
        for i, (group, block) in enumerate(zip(places, lora_b.split(height), strict=True)):
            dense[group * height : (group + 1) * height, i * r : (i + 1) * r] = block
        return lora_a, dense

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={list(self.enable_lora)}"

"""MiniLM as a mixture: sparse upcycling (Komatsuzaki et al. 2023) of its feed-forwards.

    y = sum over the k experts e of a token of weight_e * (gelu(x W1_e^T + b1_e) W2_e^T + b2_e)

Each expert begins as a copy of the dense feed-forward, the router is random and the weights of a
token sum to one: so before training the mixture computes what MiniLM does.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from .. import minilm

EXPERTS = 8
CHOSEN = 2  # of them for each token
_SEED = 3


class Router(nn.Module):
    """Which experts each token gets, and with what weights; frozen.

    Attributes:
        routes: a digest of the experts of each call in training mode.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, width) / width**0.5)
        self.routes: list[bytes] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, H] -> (experts [tokens, k], weights [tokens, k])."""
        scores, index = nn.functional.linear(x, self.weight).topk(CHOSEN)
        if self.training:
            self.routes.append(hashlib.sha256(index.numpy().tobytes()).digest())
        return index, scores.softmax(-1)


@use_experts_implementation(has_gate=False, has_bias=True)
class FeedForwardExperts(nn.Module):
    """E feed-forwards in stacks of weights; the forward is transformers' `grouped_mm`."""

    def __init__(self, config: Any, dense: nn.Linear, down: nn.Linear, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        for name, linear in (("up_proj", dense), ("down_proj", down)):
            for parameter, suffix in ((linear.weight, ""), (linear.bias, "_bias")):
                stack = parameter.detach().expand(EXPERTS, *parameter.shape).clone()
                self.register_parameter(name + suffix, nn.Parameter(stack))
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError("the decorator's implementations take its place")


class Mixture(nn.Module):
    """In the place of a feed-forward's first half; the second becomes the identity."""

    def __init__(self, config: Any, layer: Any) -> None:
        super().__init__()
        self.router = Router(config.hidden_size).to(layer.output.dense.weight.dtype)
        halves = layer.intermediate.dense, layer.output.dense
        self.experts = FeedForwardExperts(config, *halves, layer.intermediate.intermediate_act_fn)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [rows, tokens, H] -> the same shape."""
        x = hidden.flatten(0, -2)
        return self.experts(x, *self.router(x)).view(hidden.shape)


def steps_with_same_routes(model: nn.Module, other: nn.Module, steps: int) -> int:
    """The number of training steps, from the first on, in which every token had the same experts in
    both models. Where two experts of a token have nearly the same score, a rounding decides."""
    each, others = (
        [module.routes[:steps] for module in found.modules() if isinstance(module, Router)]
        for found in (model, other)
    )
    for step in range(steps):
        if any(a[step] != b[step] for a, b in zip(each, others, strict=True)):
            return step
    return steps


def upcycled(encoder: Any) -> Any:
    """The encoder with mixtures for its feed-forwards, in place, frozen."""
    torch.manual_seed(_SEED)
    encoder.config._experts_implementation = "grouped_mm"
    for layer in encoder.encoder.layer:
        layer.intermediate = Mixture(encoder.config, layer)
        layer.output.dense = nn.Identity()
    return encoder.requires_grad_(False)


def encoder() -> Any:
    """MiniLM upcycled, float32."""
    return upcycled(minilm.encoder(torch.float32))

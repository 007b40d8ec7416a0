"""One decision, one call: how a layer's forward is computed, and low-rank updates on a base."""

from .decision import Call, Decision, Path

__all__ = ["Call", "Decision", "Path"]

"""The floating dtypes in which the op computes, by width."""

import torch

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *HALVES)

"""The floating dtypes that the op computes in, by their width."""

import torch

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *HALVES)

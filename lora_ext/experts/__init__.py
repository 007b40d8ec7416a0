"""The experts of a mixture with low-rank updates."""

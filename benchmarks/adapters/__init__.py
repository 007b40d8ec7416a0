"""Many adapters in one batch: what a mixed batch costs over a merged and over a frozen layer."""

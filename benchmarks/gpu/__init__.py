"""Minutes on a GPU: golden vectors, tests, sanitizers and measurements, resumable."""

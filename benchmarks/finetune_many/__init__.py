"""Eight adapters of one frozen MiniLM, trained and served in one batch: `make demo-many`."""

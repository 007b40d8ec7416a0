"""Training steps of whole models: frozen, with our adapters, with PEFT's."""

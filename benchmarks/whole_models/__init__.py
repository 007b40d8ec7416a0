"""Steps and forwards of whole models: frozen, with our adapters, with PEFT's, accelerated."""

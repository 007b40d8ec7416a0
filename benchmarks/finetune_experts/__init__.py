"""`python -m benchmarks.finetune_experts`: the experts of a mixture learn real texts.

mixture         MiniLM whose feed-forwards are experts, each a copy of the dense one to begin with
models          what is trained side by side: frozen, with lora_ext, with PEFT
claims          what the run claims, and whether it holds
experts_report  what is said of it

Texts, classifier and training are those of `benchmarks.finetune`.
"""

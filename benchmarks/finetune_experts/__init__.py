"""`python -m benchmarks.finetune_experts`: the experts of a mixture learn real texts.

mixture          MiniLM whose feed-forwards are experts, each a copy of the dense one to begin with
models           what is trained side by side: frozen, with lora_ext, with PEFT
two_tasks        two tasks in one batch, with dropout, beside PEFT one task after the other
claims           what the run claims, and whether it holds
experts_report   what is said of it
experts_figures  what is drawn of it

Texts, classifier and training are those of `benchmarks.finetune`, the training of two tasks is that
of `benchmarks.finetune_many`.
"""

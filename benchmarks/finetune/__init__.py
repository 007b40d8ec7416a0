"""`python -m benchmarks.finetune`: MiniLM learns real texts with lora_ext and with PEFT.

data            which texts, which labels, what is held out
classifier      the model: MiniLM, mean pooling, a linear head; batches of tokens
trained_models  the models that are trained side by side, from the same initial values
training        step by step in turns: losses, times, memory, accuracy
round_trip      saved, loaded into a new model, merged, opened by PEFT: the same predictions?
claims          what the run claims, and whether it holds
finetune_report what is said of it
"""

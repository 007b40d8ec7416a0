"""Train two adapters of one model in one batch: each sample has its own.

One task continues text as it is, the other answers in capitals. A tiny Llama with random weights
learns both, in seconds on a CPU; the frozen weights are read once for the whole batch.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext

ROWS, LENGTH, STEPS = 8, 64, 60
TASKS = ["plain", "capitals"]

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape)).bfloat16()
config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
model = get_peft_model(base, config, "plain")
model.add_adapter("capitals", config)
model.base_model.set_adapter(TASKS)  # both are trained
lora_ext.accelerate(model)

text = Path(__file__).read_bytes()
texts = [torch.tensor(list(text)), torch.tensor(list(text.upper()))]


def batch():
    """Rows of the two tasks, and the adapter of each row."""
    place = torch.randint(len(text) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH)
    return torch.cat([task[place] for task in texts]), [name for name in TASKS for _ in range(ROWS)]


def loss_of(ids, names):
    with lora_ext.use_adapters(model, names):
        return model(input_ids=ids, labels=ids).loss


optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(STEPS + 1):
    loss = loss_of(*batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

ids, names = batch()
with torch.no_grad():
    swapped = loss_of(ids, names[::-1]).item()
    print(f"each with its adapter: loss {loss_of(ids, names).item():.2f}; swapped: {swapped:.2f}")

"""Fine-tune the experts of a mixture, with dropout, which PEFT alone refuses there.

A tiny Qwen3-MoE with random weights learns the bytes of this file, in seconds on a CPU.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_ext

ROWS, LENGTH, STEPS = 8, 64, 60

torch.manual_seed(0)
shape = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
mixture = {"num_experts": 16, "num_experts_per_tok": 4}
base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **mixture)).bfloat16()

# The experts' weights are parameters, not modules: PEFT has target_parameters for them.
config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(base, config)
lora_ext.accelerate(model, expert_dropout=0.05)
print(lora_ext.explain(model))

text = torch.tensor(list(Path(__file__).read_bytes()))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(STEPS + 1):
    starts = torch.randint(len(text) - LENGTH, (ROWS, 1))
    ids = text[starts + torch.arange(LENGTH)]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

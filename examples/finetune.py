"""Fine-tune a PEFT model with one more line, save it, load it, and undo the line.

A tiny Llama with random weights learns the bytes of this file, in seconds on a CPU.
"""

from pathlib import Path
from tempfile import mkdtemp

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext

ROWS, LENGTH, STEPS = 8, 64, 60


def base_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape)).bfloat16()


config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
model = get_peft_model(base_model(), config)
lora_ext.accelerate(model)  # the one line
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

folder = Path(mkdtemp()) / "adapter"
model.save_pretrained(folder)  # PEFT's own files
again = lora_ext.accelerate(PeftModel.from_pretrained(base_model(), folder))
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
    same = torch.equal(logits, again.eval()(input_ids=ids).logits)
    print(
        f"saved {sorted(path.name for path in folder.iterdir())}; loaded, the same logits: {same}"
    )
    lora_ext.decelerate(model)  # PEFT's forward again
    off = (model(input_ids=ids).logits - logits).abs().max().item()
largest = logits.abs().max().item()
print(f"without lora_ext the logits differ by at most {off:.3f}; the largest is {largest:.1f}")

"""Compute the cross-entropy of labels without [N, V] logits, in two ways.

`LazyLogits.log_prob` works with any head. `patch(model)` changes a transformers model so that its
own loss makes no logits. Without arguments the model is tiny and random. For a real model that
learns a text, pass `--model NAME --text FILE`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_kernels.integrations.labels import patch
from opd_kernels.integrations.transformers import lazy_logits

parser = argparse.ArgumentParser()
for option in ("--model", "--text"):
    parser.add_argument(option)
arguments = parser.parse_args()

torch.manual_seed(0)
if arguments.model:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    input_ids = torch.tensor([tokenizer(Path(arguments.text).read_text()).input_ids[:512]])
else:
    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    input_ids = torch.randint(3, 1000, (4, 32))
labels = input_ids.clone()
labels[:, :4] = -100  # tokens without a loss, such as those of a prompt

print(f"with logits      loss {model(input_ids, labels=labels).loss:.6f}")

targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # each position's next token
log_probs = lazy_logits(model, input_ids).log_prob(targets)  # [B, T], 0 where the target is -100
print(f"by log_prob      loss {-log_probs.sum() / (targets != -100).sum():.6f}")

patch(model)  # with labels, the model now returns a loss and no logits
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(20):
    loss = model(input_ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"patched, step {step:<2} loss {loss:.6f}")

"""distillation_loss in a plain PyTorch loop: two causal language models, token ids, an optimiser.

Without arguments the student is a tiny random model and the teacher the same one with noise on its
weights. With `--student NAME --teacher NAME --text FILE`, two models that share a tokenizer, on the
text of a file. `--support student` takes the student's top 20 instead of the whole vocabulary.
"""

import argparse
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_kernels import distillation_loss, reverse_kl
from opd_kernels.integrations.transformers import lazy_logits

parser = argparse.ArgumentParser()
for name in ("student", "teacher", "text"):
    parser.add_argument(f"--{name}")
parser.add_argument("--support", default="full")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--learning-rate", type=float, default=5e-3)
arguments = parser.parse_args()

torch.manual_seed(0)
if arguments.student:
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    tokens = torch.tensor(tokenizer(Path(arguments.text).read_text()).input_ids)
else:
    config = AutoConfig.for_model(
        "llama", vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config)
    teacher = deepcopy(student)
    for weight in teacher.parameters():
        weight.data += 0.2 * weight.std() * torch.randn_like(weight)
    tokens = torch.randint(0, 500, (2048,))
sequences = tokens[: len(tokens) // 32 * 32].view(-1, 32)

optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate)
objective = partial(reverse_kl, tail="bucket")
for step in range(arguments.steps):
    input_ids = sequences[torch.randint(0, len(sequences), (8,))]
    with torch.no_grad():
        t = lazy_logits(teacher, input_ids)  # hidden states and head; nothing of size [N, V]
    s = lazy_logits(student, input_ids)
    output = distillation_loss(s, t, k=20, support=arguments.support, objective=objective)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {output.loss:.4f}  on S: {output.student.mass.mean():.3f}")

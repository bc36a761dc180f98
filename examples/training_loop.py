"""Distil a teacher into a student in a plain PyTorch loop.

python examples/training_loop.py                            # two tiny random models
python examples/training_loop.py STUDENT TEACHER TEXT_FILE  # models that share a tokenizer
"""

import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_kernels import distillation_loss, reverse_kl
from opd_kernels.integrations.transformers import lazy_logits

torch.manual_seed(0)
if len(sys.argv) > 1:
    names, text = sys.argv[1:3], Path(sys.argv[3]).read_text()
    student, teacher = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in names)
    tokens = AutoTokenizer.from_pretrained(names[0])(text, return_tensors="pt").input_ids[0]
else:
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, initializer_range=0.5)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    tokens = torch.randint(500, (2048,))
sequences = tokens.unfold(0, 32, 32)  # [number of sequences, 32]

optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
objective = partial(
    reverse_kl, tail="bucket"
)  # on the student's top K, and one bucket for the rest
for step in range(30):
    input_ids = sequences[torch.randint(len(sequences), (8,))]
    with torch.no_grad():
        teacher_logits = lazy_logits(teacher, input_ids)  # hidden states and head, not [N, V]
    student_logits = lazy_logits(student, input_ids)
    loss = distillation_loss(student_logits, teacher_logits, k=20, objective=objective).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss:.4f}")

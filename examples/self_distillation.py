"""On-policy self-distillation without a trainer: sample, score with privileged context, learn.

The teacher is a frozen copy of the student. Its prompts begin with a context that the student does
not see. Without arguments the model is tiny and random, and the context is three tokens. With
`--model NAME` a real chat model learns to follow a rule that it is not shown.
"""

import argparse
from copy import deepcopy
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_kernels import distillation_loss, reverse_kl
from opd_kernels.integrations.transformers import lazy_logits, pad_completions

RULE = "Answer like a pirate."
QUESTIONS = ["What is a tree?", "How do I cook rice?", "Why is the sky blue?", "What is a river?"]

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=8, help="maximum tokens per completion")
parser.add_argument("--learning-rate", type=float, default=5e-3)
arguments = parser.parse_args()

torch.manual_seed(0)
if arguments.model:
    student = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    prompts = [template(chat) for chat in chats]
    privileged = [template([{"role": "system", "content": RULE}, *chat]) for chat in chats]
else:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=2, **sizes,
                                  initializer_range=0.3)  # fmt: skip
    student = AutoModelForCausalLM.from_config(config)
    prompts = torch.randint(3, 100, (8, 5)).tolist()
    privileged = [[7, 8, 9, *prompt] for prompt in prompts]
teacher = deepcopy(student).eval()


@torch.no_grad()
def sample(prompt):
    """Return a completion sampled from the student's unmodified distribution, as token ids."""
    ids = torch.tensor([prompt])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"repetition_penalty": 1.0, "max_new_tokens": arguments.length}
    output = student.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, len(prompt) :].tolist()


objective = partial(reverse_kl, tail="bucket")
optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate)
for step in range(arguments.steps):
    completions = [sample(prompt) for prompt in prompts]
    ids, mask, predicts = pad_completions(prompts, completions, student.device)
    student_logits = lazy_logits(student, ids, mask)[predicts]  # one row per completion token
    with torch.no_grad():
        ids, mask, predicts = pad_completions(privileged, completions, student.device)
        teacher_logits = lazy_logits(teacher, ids, mask)[predicts]  # the same tokens in order
    output = distillation_loss(student_logits, teacher_logits, k=20, objective=objective)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {output.loss:.4f}  mass on S {output.student.mass.mean():.3f}")

"""Learn from a teacher behind a server, which sends its top K log-probabilities per token.

Without arguments a tiny local model plays the server. For a real one, pass
`--url http://HOST/v1 --student NAME --text TEXT`. The server must accept token ids and return
`prompt_logprobs`, as vLLM's does. Its API key is read from OPD_TEACHER_API_KEY.
"""

import argparse
import json
import os
from functools import partial
from urllib.request import Request, urlopen

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_kernels import SparseLogits, distillation_loss, forward_kl
from opd_kernels.integrations.transformers import lazy_logits

K = 8
parser = argparse.ArgumentParser()
for option in ("--url", "--student", "--text"):
    parser.add_argument(option)
arguments = parser.parse_args()


def prompt_logprobs(ids):
    """Return the top K per token as {id: {"logprob": x}}; None for the first token."""
    if arguments.url:
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": K, "add_special_tokens": False}
        key = os.environ.get("OPD_TEACHER_API_KEY", "none")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = Request(f"{arguments.url}/completions", json.dumps(body).encode(), headers)
        return json.load(urlopen(request))["choices"][0]["prompt_logprobs"]
    best = local_teacher(torch.tensor([ids])).logits[0].log_softmax(-1).topk(K)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [None, *[{i: {"logprob": x} for i, x in zip(*row, strict=True)} for row in rows][:-1]]


def sparse_logits(answers, vocab_size):
    """Return SparseLogits [B, T - 1, K + 1]; the extra slot is for a token outside the top K."""
    shape = (len(answers), len(answers[0]) - 1, K + 1)
    ids, log_probs = torch.full(shape, -1), torch.full(shape, -torch.inf)  # -1 marks an empty slot
    for b, rows in enumerate(answers):
        for t, row in enumerate(rows[1:]):
            for slot, (token, found) in enumerate(row.items()):
                ids[b, t, slot], log_probs[b, t, slot] = int(token), found["logprob"]
    return SparseLogits.from_log_probs(log_probs, ids, vocab_size=vocab_size)


torch.manual_seed(0)
if arguments.student:
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    input_ids = torch.tensor([tokenizer(arguments.text).input_ids])
else:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, num_attention_heads=2, **sizes)
    student, local_teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    local_teacher.lm_head.weight.data *= 30  # without this its predictions are nearly uniform
    input_ids = torch.randint(3, 100, (4, 16))

answers = [prompt_logprobs(ids) for ids in input_ids.tolist()]
teacher = sparse_logits(answers, vocab_size=student.get_output_embeddings().weight.shape[0])
objective = partial(forward_kl, tail="bucket")
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(30):
    logits = lazy_logits(student, input_ids)[:, :-1]  # position t predicts token t + 1
    loss = distillation_loss(logits, teacher, k=K + 1, support="teacher", objective=objective).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss:.4f}  teacher's mass on S {teacher.mass.mean():.3f}")

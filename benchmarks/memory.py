"""Peak memory of one forward and backward pass, beyond the inputs and the gradients that it
returns.

Each provider runs in a subprocess of its own, so that no allocator keeps what another one took. The
peak is the kernel's high-water mark of the resident set, reset just before the pass.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from opd_kernels import LazyLogits, distillation_loss, reverse_kl

MIB = 1 << 20


def eager_full(student: LazyLogits, teacher: LazyLogits) -> torch.Tensor:
    """The exact reverse KL on full logits, as most trainers compute it."""
    log_p = (student.hidden @ student.weight.T).log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def eager_topk(student: LazyLogits, teacher: LazyLogits) -> torch.Tensor:
    """The top-20 reverse KL with stop-gradient on full logits."""
    z = student.hidden @ student.weight.T
    values, ids = z.topk(20, dim=-1)
    log_p = values - z.logsumexp(-1, keepdim=True)
    with torch.no_grad():
        zt = teacher.hidden @ teacher.weight.T
        log_q = zt.gather(-1, ids) - zt.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p.detach() - log_q)).sum(-1).mean()


def ours(student: LazyLogits, teacher: LazyLogits, **options: str) -> torch.Tensor:
    """distillation_loss with k = 20 at default settings."""
    return distillation_loss(student, teacher, k=20, objective=reverse_kl, **options).loss


PROVIDERS = {
    "ours_recompute": lambda s, t: ours(s, t, method="recompute"),
    "ours_one_pass": lambda s, t: ours(s, t, method="one_pass"),
    "ours_full": lambda s, t: ours(s, t, support="full"),
    "eager_topk": eager_topk,
    "eager_full": eager_full,
}


def make_inputs(tokens: int, dim: int, vocab: int) -> tuple[LazyLogits, LazyLogits]:
    """A student that trains hidden and weight, and a frozen teacher of the same shape."""
    generator = torch.Generator().manual_seed(0)

    def operand(rows: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, dim, generator=generator)

    student = LazyLogits(
        operand(tokens, 1.0).requires_grad_(), operand(vocab, dim**-0.5).requires_grad_()
    )
    return student, LazyLogits(operand(tokens, 1.0), operand(vocab, dim**-0.5))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_extra_bytes(provider: str, tokens: int, dim: int, vocab: int) -> int:
    """Peak resident memory of a pass beyond inputs, dhidden and dweight, in bytes (Linux)."""
    run = PROVIDERS[provider]
    run(*make_inputs(8, dim, 64)).backward()  # libraries load their code and buffers
    student, teacher = make_inputs(tokens, dim, vocab)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(student, teacher).backward()
    returned = sum(x.numel() * x.element_size() for x in (student.hidden, student.weight))
    return _status("VmHWM") - before - returned


def measure(provider: str, tokens: int, dim: int, vocab: int) -> int:
    """peak_extra_bytes in a subprocess."""
    call = f"print(peak_extra_bytes({provider!r}, {tokens}, {dim}, {vocab}))"
    code = f"from benchmarks.memory import peak_extra_bytes; {call}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("memory", help="peak memory of each provider")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table of the peak memory of every provider."""
    shape = (arguments.tokens, arguments.dim, arguments.vocab)
    logits = shape[0] * shape[2] * 4 / MIB
    print(f"N = {shape[0]}, D = {shape[1]}, V = {shape[2]}, float32;", end=" ")
    print(f"one logits tensor: {logits:.0f} MiB\n")
    print("| provider | peak extra MiB |\n|---|---|")
    figures = {}
    for provider in PROVIDERS:
        figures[provider] = measure(provider, *shape)
        print(f"| {provider} | {figures[provider] / MIB:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": shape, "bytes": figures}, indent=2))

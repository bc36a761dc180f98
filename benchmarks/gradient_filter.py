"""Error of the gradient filter on real hidden states.

The demo's student samples completions at temperature 1, and both models score them. The gradient of
each loss is computed with and without the filter. Errors are relative, in the Frobenius norm.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.markdown import markdown_table
from opd_kernels import LazyLogits, SparseLogits, distillation_loss, reverse_kl
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.models.teacher import on_completions

OBJECTIVES: dict[str, Callable[[SparseLogits, SparseLogits], Tensor]] = {
    "stop-gradient": reverse_kl,
    "tail bucket": partial(reverse_kl, tail="bucket"),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("filter", help="error of gradient_filter on real hidden states")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--exponents", type=int, nargs="+", default=[10, 12, 14, 16, 18, 20])
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table with one row per threshold eps."""
    student, teacher = real_logits(arguments.recipe, arguments.prompts)
    p = student.detach().materialize().softmax(-1)
    mass = student.detach().topk(20).mass.mean()
    print(f"{p.shape[0]} tokens, V = {p.shape[1]}, K = 20, temperature 1, float32; ", end="")
    print(f"mean probability of S {mass:.3f}\n")
    exact = {name: gradients(student, teacher, name, None)[0] for name in OBJECTIVES}
    rows = []
    for exponent in tqdm(arguments.exponents):
        eps = 2.0**-exponent
        errors = []
        for name in OBJECTIVES:
            filtered, dropped = gradients(student, teacher, name, eps)
            for ours, true in zip(filtered, exact[name], strict=True):
                errors.append(f"{(ours - true).norm() / true.norm():.2%}")
        assert dropped is not None  # a filter reports it
        entries = f"{(p >= eps).sum(-1).double().mean():.0f}"
        rows.append([f"2^-{exponent}", entries, f"{dropped.mean():.2%}", *errors])
    names = [f"{name}: {side}" for name in OBJECTIVES for side in ("dhidden", "dweight")]
    print(markdown_table(("eps", "entries per token", "dropped probability", *names), rows))


def real_logits(recipe: Path, prompts: int) -> tuple[LazyLogits, LazyLogits]:
    """Return the recipe's student, as leaves, and its teacher on completions of the student."""
    overrides = ["--temperature", "1", "--output_dir", "runs/gradient_filter"]
    trainer, _ = prepare(load_config(DistillationConfig, recipe, overrides))
    completions = trainer.sampler.sample(trainer.model, list(trainer.train_dataset)[:prompts], 0)
    (teacher,) = trainer.evaluation.local.values()
    with torch.no_grad():
        scored = teacher.logits(completions, 1.0)
        student = on_completions(trainer.model.eval(), completions, 1.0, lambda logits: logits)
    hidden, weight = (x.detach().clone().requires_grad_() for x in (student.hidden, student.weight))
    return LazyLogits(hidden, weight), scored


def gradients(
    student: LazyLogits, teacher: LazyLogits, objective: str, eps: float | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return dhidden and dweight, and the probability that the filter dropped, per token."""
    output = distillation_loss(
        student, teacher, objective=OBJECTIVES[objective], method="one_pass", gradient_filter=eps
    )
    inputs = (student.hidden, student.weight)
    return torch.autograd.grad(output.loss, inputs), output.dropped

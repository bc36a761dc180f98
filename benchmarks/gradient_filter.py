"""Error of the gradient filter on real hidden states.

The demo's student samples completions at temperature 1; student and teacher are scored on them, and
the gradient of every loss is taken with and without the filter. Errors are relative, in the
Frobenius norm.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from opd_kernels import LazyLogits, distillation_loss, reverse_kl
from trainer.build import prepare
from trainer.config import load_config
from trainer.models.teacher import side_by_side

OBJECTIVES: dict[str, Callable] = {
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
    """Print a Markdown table: an eps a line."""
    student, teacher = real_logits(arguments.recipe, arguments.prompts)
    p = student.detach().materialize().softmax(-1)
    mass = student.detach().topk(20).mass.mean()
    print(f"{p.shape[0]} tokens, V = {p.shape[1]}, K = 20, temperature 1, float32; ", end="")
    print(f"mean probability of S {mass:.3f}\n")
    names = [f"{name}: {side}" for name in OBJECTIVES for side in ("dhidden", "dweight")]
    print(f"| eps | entries per token | dropped probability | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    exact = {name: gradients(student, teacher, name, None)[0] for name in OBJECTIVES}
    for exponent in tqdm(arguments.exponents):
        eps = 2.0**-exponent
        cells = [f"2^-{exponent}", f"{(p >= eps).sum(-1).double().mean():.0f}"]
        errors = []
        for name in OBJECTIVES:
            filtered, dropped = gradients(student, teacher, name, eps)
            for ours, true in zip(filtered, exact[name], strict=True):
                errors.append(f"{(ours - true).norm() / true.norm():.2%}")
        tqdm.write(f"| {' | '.join([*cells, f'{dropped.mean():.2%}', *errors])} |")


def real_logits(recipe: Path, prompts: int) -> tuple[LazyLogits, LazyLogits]:
    """The recipe's student, as leaves, and teacher on completions that the student samples."""
    overrides = ["--temperature", "1", "--output_dir", "runs/gradient_filter"]
    trainer, _ = prepare(load_config(recipe, overrides))
    completions = trainer.sampler.sample(trainer.model, list(trainer.train_dataset)[:prompts], 0)
    with torch.no_grad():
        student, teacher = side_by_side(
            trainer.model.eval(), trainer.teacher, completions, 1.0, lambda s, t: (s, t)
        )
    leaves = (x.detach().clone().requires_grad_() for x in (student.hidden, student.weight))
    return LazyLogits(*leaves), teacher


def gradients(
    student: LazyLogits, teacher: LazyLogits, objective: str, eps: float | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """dhidden and dweight, and the probability that the filter dropped."""
    out = distillation_loss(
        student, teacher, objective=OBJECTIVES[objective], method="one_pass", gradient_filter=eps
    )
    return torch.autograd.grad(out.loss, (student.hidden, student.weight)), out.dropped

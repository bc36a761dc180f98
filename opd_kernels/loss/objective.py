"""The objective as distillation_loss sees it: any function of two SparseLogits, and its checks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_kernels.divergences import forward_kl, jsd, reverse_kl
from opd_kernels.sparse_logits import SparseLogits

Objective = Callable[[SparseLogits, SparseLogits], Tensor]


def freeze_rows(sparse: SparseLogits, frozen: Tensor) -> SparseLogits:
    """The same rows, of which the frozen [N] get no gradient, not even 0 * inf."""

    def freeze(tensor: Tensor) -> Tensor:
        mask = frozen.reshape(-1, *[1] * (tensor.dim() - 1))
        return torch.where(mask, tensor.detach(), tensor)

    tail = None if sparse.tail is None else freeze(sparse.tail)
    return replace(sparse, values=freeze(sparse.values), tail=tail)


def per_token_loss(objective: Objective, student: SparseLogits, teacher: SparseLogits) -> Tensor:
    """objective(student, teacher), checked: one loss per row."""
    loss = objective(student, teacher)
    rows = student.values.shape[:-1]
    if not isinstance(loss, Tensor) or loss.shape != rows or not loss.is_floating_point():
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective: expected a loss per row, a floating tensor of shape {tuple(rows)}, got "
            f"{got}; do not reduce in it, distillation_loss does"
        )
    if student.values.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "objective: its loss has no gradient with respect to the student; do not detach the "
            "student in it, or call distillation_loss under torch.no_grad() to measure only"
        )
    return loss


def reverse_kl_options(objective: Objective) -> tuple[bool, bool] | None:
    """(stop_gradient, bucket) of the package's own reverse KL that does not renormalise; None for
    other objectives.
    """
    function, options = _unpacked(objective)
    stop_gradient, tail = options.pop("stop_gradient", True), options.pop("tail", "drop")
    if function is not reverse_kl or options or tail not in ("drop", "bucket"):
        return None
    if not isinstance(stop_gradient, bool):
        return None  # the function refuses it
    return stop_gradient, tail == "bucket"


def jsd_beta(objective: Objective) -> float | None:
    """The beta of the generalised JSD that an objective is where S is all of V; None for others.

    There forward KL is beta = 0, reverse KL is beta = 1, and neither the tail nor the stop-gradient
    makes a difference.
    """
    objective, options = _unpacked(objective)
    tail, beta = options.pop("tail", "drop"), options.pop("beta", 0.5)
    stop_gradient = options.pop("stop_gradient", True)
    if options or tail not in ("drop", "bucket") or not isinstance(stop_gradient, bool):
        return None  # another function's, or what these refuse
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if objective is jsd and is_number and 0 <= beta <= 1:
        return float(beta)
    return 1.0 if objective is reverse_kl else 0.0 if objective is forward_kl else None


def _unpacked(objective: Objective) -> tuple[Objective, dict[str, Any]]:
    """The function under a functools.partial of keywords, and these."""
    if isinstance(objective, partial) and not objective.args:
        return objective.func, dict(objective.keywords)
    return objective, {}

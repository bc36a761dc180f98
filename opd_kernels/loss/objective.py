"""The objective: any function of two SparseLogits, its checks, and the fast path for our own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.divergences import forward_kl, jsd, reverse_kl
from opd_kernels.sparse_logits import SparseLogits, check_same_distribution, derived

Objective = Callable[[SparseLogits, SparseLogits], Tensor]


def loss_on_support(
    objective: Objective,
    student: SparseLogits,
    teacher: SparseLogits,
    epilogues: Epilogues | None,
    frozen: Tensor | None,
) -> Tensor:
    """The loss [n] of each row, differentiable through the student's values [n, K] and tail [n].

    The backend computes the package's reverse KL together with its gradient. On a GPU autograd
    would launch about sixty kernels of a few microseconds for it.

    Args:
        objective: of student and teacher, on the same ids.
        student, teacher: on the same ids; the teacher is detached.
        epilogues: the backend; None computes every objective by autograd.
        frozen: [n] rows that get no gradient, not even 0 * inf; None for no such row.
    """
    options = None if epilogues is None else reverse_kl_options(objective)
    if options is None or epilogues is None:
        student = student if frozen is None else _freeze_rows(student, frozen)
        return per_token_loss(objective, student, teacher)
    check_same_distribution(student, teacher)
    assert student.values.shape == teacher.values.shape  # supports.align_teacher ensures it
    values, tail, (stop_gradient, bucket) = student.values, student.lse_outside, options
    models = (values.detach(), tail.detach(), teacher.values, teacher.lse_outside)
    result = epilogues.reverse_kl(*models, stop_gradient=stop_gradient, bucket=bucket)
    return _KnownGradient.apply(values, tail, *result, frozen)


class _KnownGradient(torch.autograd.Function):
    """A loss [n] whose gradient with respect to values [n, K] and tail [n] is already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        tail: Tensor,
        loss: Tensor,
        dvalues: Tensor,
        dtail: Tensor,
        frozen: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(dvalues, dtail, frozen)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        dvalues, dtail, frozen = ctx.saved_tensors
        zero = dloss == 0  # 0 * inf would be NaN
        if frozen is not None:
            zero |= frozen
        dvalues = (dvalues * dloss[:, None]).masked_fill_(zero[:, None], 0.0)
        return dvalues, (dtail * dloss).masked_fill_(zero, 0.0), None, None, None, None


def _freeze_rows(sparse: SparseLogits, frozen: Tensor) -> SparseLogits:
    """The same rows, where frozen [n] rows get no gradient, not even 0 * inf."""

    def freeze(tensor: Tensor) -> Tensor:
        mask = frozen.reshape(-1, *[1] * (tensor.dim() - 1))
        return torch.where(mask, tensor.detach(), tensor)

    tail = None if sparse.tail is None else freeze(sparse.tail)
    return derived(sparse, values=freeze(sparse.values), tail=tail)


def per_token_loss(objective: Objective, student: SparseLogits, teacher: SparseLogits) -> Tensor:
    """objective(student, teacher) [...]; raises ValueError unless it is a loss for each row."""
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


def weighted_sum(per_token: Tensor, weights: Tensor | None) -> Tensor:
    """sum_n weights_n * per_token_n; a token of weight 0 adds 0, also where its loss is NaN."""
    if weights is None:
        return per_token.sum()
    return (per_token * weights).masked_fill(weights == 0, 0.0).sum()


def reverse_kl_options(objective: Objective) -> tuple[bool, bool] | None:
    """(stop_gradient, bucket) of the package's own reverse KL; None for any other objective.

    None too with tail="renormalize".
    """
    function, options = _unpacked(objective)
    stop_gradient, tail = options.pop("stop_gradient", True), options.pop("tail", "drop")
    if function is not reverse_kl or options or tail not in ("drop", "bucket"):
        return None
    if not isinstance(stop_gradient, bool):
        return None  # reverse_kl refuses it
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
        return None  # options of another function, or options that our divergences refuse
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if objective is jsd and is_number and 0 <= beta <= 1:
        return float(beta)
    return 1.0 if objective is reverse_kl else 0.0 if objective is forward_kl else None


def _unpacked(objective: Objective) -> tuple[Objective, dict[str, Any]]:
    """The function inside a functools.partial of keywords, and the keywords."""
    if isinstance(objective, partial) and not objective.args:
        return objective.func, dict(objective.keywords)
    return objective, {}

"""The loss of rows on their support: by autograd, sixty kernels of a few microseconds on a GPU, or
the reverse KL by one kernel, where the backend has it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_kernels.backends import Epilogues
from opd_kernels.divergences import check_same_distribution
from opd_kernels.loss.objective import Objective, freeze_rows, per_token_loss, reverse_kl_options
from opd_kernels.sparse_logits import SparseLogits


def support_loss(
    student: SparseLogits,
    teacher: SparseLogits,
    objective: Objective,
    epilogues: Epilogues | None,
    frozen: Tensor | None = None,
) -> Tensor:
    """The loss [n] of each row, differentiable through the student's values [n, K] and tail [n];
    rows that are frozen [n] get no gradient, not even 0 * inf. The teacher is detached. Without
    epilogues it is by autograd.
    """
    options = reverse_kl_options(objective)
    if options is not None and epilogues is not None:
        check_same_distribution(student, teacher)
        assert student.values.shape == teacher.values.shape  # supports.align puts them so
        values, tail = student.values, student.lse_outside
        models = (values.detach(), tail.detach(), teacher.values, teacher.lse_outside)
        result = epilogues.reverse_kl(*models, *options)
        if result is not None:
            return _GivenGradient.apply(values, tail, *result)
    if frozen is not None:
        student = freeze_rows(student, frozen)
    return per_token_loss(objective, student, teacher)


class _GivenGradient(torch.autograd.Function):
    """A loss [n] whose gradient wrt values [n, K] and tail [n] is already there."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, tail: Tensor, loss: Tensor, dvalues: Tensor, dtail: Tensor
    ) -> Tensor:
        ctx.save_for_backward(dvalues, dtail)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        dvalues, dtail = ctx.saved_tensors
        frozen = dloss == 0  # not even 0 * inf
        dvalues = (dvalues * dloss[:, None]).masked_fill_(frozen[:, None], 0.0)
        return dvalues, (dtail * dloss).masked_fill_(frozen, 0.0), None, None, None

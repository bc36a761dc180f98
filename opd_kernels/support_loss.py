"""The loss of rows on their support and its gradient, on [c, K] tensors.

Any objective is differentiated by autograd, some sixty kernels of a few microseconds on a GPU. The
reverse KL is one kernel where the backend has it.
"""

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues
from opd_kernels.divergences import check_same_distribution
from opd_kernels.objective import Objective, freeze_rows, per_token_loss, reverse_kl_options
from opd_kernels.sparse_logits import SparseLogits


def support_losses(
    student: SparseLogits,
    teacher: SparseLogits,
    leaf: SparseLogits,
    objective: Objective,
    upstream: Tensor,
    epilogues: Epilogues,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss [c] of each row, and upstream [c] times its gradient wrt the values [c, K] and the
    tail [c] of leaf, from which student was made; None for a tail that the loss never used.
    """
    options = reverse_kl_options(objective)
    if options is not None and student.values is leaf.values and student.tail is leaf.tail:
        fused = _fused_reverse_kl(student, teacher, upstream, *options, epilogues)
        if fused is not None:
            return fused
    with torch.enable_grad():
        rows = freeze_rows(student, upstream == 0)
        per_token = per_token_loss(objective, rows, teacher)
        dvalues, dtail = torch.autograd.grad(
            per_token, (leaf.values, leaf.lse_outside), upstream, allow_unused=True
        )
    return per_token.detach(), torch.zeros_like(leaf.values) if dvalues is None else dvalues, dtail


def _fused_reverse_kl(
    student: SparseLogits,
    teacher: SparseLogits,
    upstream: Tensor,
    stop_gradient: bool,
    bucket: bool,
    epilogues: Epilogues,
) -> tuple[Tensor, Tensor, Tensor] | None:
    if student.values.dtype != teacher.values.dtype or teacher.tail is None:
        return None
    check_same_distribution(student, teacher)
    return epilogues.reverse_kl(
        student.values.detach(),
        student.lse_outside.detach(),
        teacher.values.detach(),
        teacher.tail.detach(),
        upstream,
        stop_gradient,
        bucket,
    )

"""The providers to compare: each computes one loss on the same inputs.

A provider is a function of Inputs that returns a scalar loss. Peers come with the extra `bench`;
each is imported by the function that needs it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.problems import Inputs
from opd_kernels import distillation_loss, reverse_kl

Provider = Callable[[Inputs], Tensor]


class _BareMatmuls(torch.autograd.Function):
    """The four matrix products that an exact loss and its backward need, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        logits = hidden @ weight.T
        teacher_hidden @ teacher_weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden, None, None


def floor(inputs: Inputs) -> Tensor:
    """The matrix products of student, teacher, dhidden and dweight, without a loss."""
    student, teacher = inputs.student, inputs.teacher
    return _BareMatmuls.apply(student.hidden, student.weight, teacher.hidden, teacher.weight)


def eager_full(inputs: Inputs) -> Tensor:
    """The exact reverse KL on full logits, as most trainers compute it."""
    student, teacher = inputs.student, inputs.teacher
    log_p = (student.hidden @ student.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher.hidden @ teacher.weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def eager_topk(inputs: Inputs) -> Tensor:
    """The top-K reverse KL with stop-gradient on full logits."""
    student, teacher = inputs.student, inputs.teacher
    z = (student.hidden @ student.weight.T).float()
    values, ids = z.topk(inputs.problem.k, dim=-1)
    log_p = values - z.logsumexp(-1, keepdim=True)
    with torch.no_grad():
        zt = (teacher.hidden @ teacher.weight.T).float()
        log_q = zt.gather(-1, ids) - zt.logsumexp(-1, keepdim=True)
    p = log_p.exp()  # the generalised KL; its gradient is that of a detached log p
    return (p * (log_p - log_q) - p + log_q.exp()).sum(-1).mean()


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger-Kernel's chunked JSD at beta = 1, the exact reverse KL, with its default chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, teacher = inputs.student, inputs.teacher
    on_gpu = student.hidden.is_cuda  # Liger compiles by default; without a GPU it runs eagerly
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=on_gpu
    )
    operands = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    return loss(*operands, inputs.labels)


def trl_chunked(inputs: Inputs) -> Tensor:
    """TRL's chunked divergence at beta = 1, the exact reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = inputs.student, inputs.teacher
    per_token, _ = ChunkedDivergenceFunction.apply(
        student.hidden, student.weight, None, teacher.hidden, teacher.weight, None, 1.0
    )
    return per_token.mean()


def ours(inputs: Inputs, **options: Any) -> Tensor:
    """distillation_loss; by default the top-K reverse KL with stop-gradient."""
    return distillation_loss(inputs.student, inputs.teacher, k=inputs.problem.k, **options).loss


def ours_labels(inputs: Inputs) -> Tensor:
    """Cross-entropy of labels by LazyLogits.log_prob, that is K = 1."""
    return -inputs.student.log_prob(inputs.labels).mean()


def torch_labels(inputs: Inputs) -> Tensor:
    """PyTorch's chunked linear_cross_entropy."""
    student = inputs.student
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(
        student.hidden, student.weight, inputs.labels, options=options
    )


def cut_labels(inputs: Inputs) -> Tensor:
    """Apple's cut cross-entropy; without a GPU only its torch_compile implementation runs."""
    from cut_cross_entropy import linear_cross_entropy

    student = inputs.student
    impl = "cce" if student.hidden.is_cuda else "torch_compile"
    return linear_cross_entropy(student.hidden, student.weight, inputs.labels, impl=impl)


def quack_labels(inputs: Inputs) -> Tensor:
    """QuACK's chunked linear cross-entropy; it needs a GPU of compute capability 9.0 or higher."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    student = inputs.student
    return chunked_linear_cross_entropy(student.hidden, student.weight, inputs.labels)


def eager_labels(inputs: Inputs) -> Tensor:
    """Cross-entropy on full logits."""
    logits = (inputs.student.hidden @ inputs.student.weight.T).float()
    return functional.cross_entropy(logits, inputs.labels)


DISTILLATION: dict[str, Provider] = {
    "floor": floor,
    "ours_one_pass": partial(ours, method="one_pass"),
    "ours_recompute": partial(ours, method="recompute"),
    "ours_filtered": partial(ours, gradient_filter=2.0**-14),
    "ours_full": partial(ours, support="full"),
    "ours_renormalize": partial(
        ours, objective=partial(reverse_kl, tail="renormalize"), method="recompute"
    ),
    "eager_topk": eager_topk,
    "eager_full": eager_full,
    "liger_jsd": liger_jsd,
    "trl_chunked": trl_chunked,
}

LABELS: dict[str, Provider] = {
    "ours_labels": ours_labels,
    "eager_labels": eager_labels,
    "torch_labels": torch_labels,
    "cut_labels": cut_labels,
    "quack_labels": quack_labels,
}

PROVIDERS = DISTILLATION | LABELS

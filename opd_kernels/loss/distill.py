"""distillation_loss: from two LazyLogits to a scalar, in either order of walking."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from opd_kernels.backends.head import accumulator_dtype
from opd_kernels.checks import check_execution, check_flags
from opd_kernels.divergences import reverse_kl
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.objective import Objective
from opd_kernels.loss.output import DistillationOutput, restore
from opd_kernels.loss.refusals import (
    check_arguments,
    check_denominator,
    check_gradient_filter,
    check_shards,
)
from opd_kernels.loss.strategy import flat_loss
from opd_kernels.loss.supports import Missing, Support
from opd_kernels.loss.token_walk import LossOptions
from opd_kernels.operands import check_ids, check_k
from opd_kernels.sparse_logits import SparseLogits


def distillation_loss(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    *,
    k: int = 20,
    support: Support | Tensor = "student",
    objective: Objective = reverse_kl,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    method: str = "auto",
    missing: Missing = "error",
    entropy: bool = False,
    compact: bool = True,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    gradient_filter: float | None = None,
) -> DistillationOutput:
    """Distil teacher into student without ever holding the [N, V] logits.

    The teacher never gets a gradient. If the two vocabularies differ in size, both are cut to the
    smaller: the larger one is taken to be padded.

    Args:
        student: hidden [..., D].
        teacher: LazyLogits with the same leading shape, of any width, or SparseLogits [..., K] from
            a server.
        k: size of the support.
        support: "student" or "teacher" (whose top-K is S), "union", "intersection", "full" (all of
            V), or integer ids [..., K].
        objective: a function (student, teacher) -> loss per token [...] of SparseLogits: a
            divergence, a functools.partial of one, or your own. It is differentiated with respect
            to the student only.
        token_weights: [...] weight of each token's loss, default 1; they get no gradient.
        reduction: "mean" = sum(w * loss) / denominator, "sum", or "none" (recompute only,
            unweighted).
        denominator: what "mean" divides by, default sum(token_weights). Pass the global number of
            tokens under gradient accumulation or several ranks.
        method: "one_pass" (token chunks [c, V], gradient during forward, no recomputation),
            "recompute" (vocabulary chunks [N, v], smallest memory), or "auto", whichever costs
            less by cost_model.py.
        missing: for a served teacher without a value on S: "error", or "drop" the slot from S.
        entropy: also fill the entropy of student and teacher (of the whole rows), from the same
            pass.
        compact: leave out tokens of weight 0 before the first matrix product (synchronises with the
            device, so not under torch.compile or in a CUDA graph).
        chunk_bytes: most memory for the student's logits at a time, and for support="full" as much
            again for the teacher's; default by the device.
        backend: "auto", or a name of available_backends().
        gradient_filter: leave tokens outside S whose probability is below this out of the gradient
            (one_pass only, an approximation; the loss stays exact). Its error was measured, see
            docs/objectives.md. Where the head is split, the k largest of each rank are always kept.

    Returns:
        DistillationOutput(loss, per_token, student, teacher, dropped); all but loss are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and the remedy.
    """
    check_arguments(student, teacher, support, objective, token_weights, reduction, method, missing)
    check_denominator(denominator, reduction)
    check_flags(entropy=entropy, compact=compact)
    check_execution(chunk_bytes, backend)
    check_gradient_filter(gradient_filter, support, reduction, method)
    check_shards(student, teacher, support, objective)
    student, teacher = _same_vocabulary(student, teacher)
    if isinstance(support, Tensor):
        check_ids(support, student.hidden)
    else:
        if support == "full" and isinstance(k, int):
            k = min(k, student.shape[-1])  # the ids that are reported
        check_k(k, student.shape[-1])
    leading = student.hidden.shape[:-1]
    student = student.flat()
    teacher = teacher.flat() if isinstance(teacher, LazyLogits) else _flat_answer(teacher, leading)
    ids = support.reshape(-1, support.shape[-1]) if isinstance(support, Tensor) else support
    weights = None
    if token_weights is not None:  # 16-bit weights would round, or overflow, in their own sum
        weights = token_weights.detach().reshape(-1)
        weights = weights.to(accumulator_dtype(student.hidden, student.weight))
    kept = None
    if compact and weights is not None and not _is_recorded(weights):
        kept = weights.nonzero()[:, 0]
        if kept.numel() == weights.numel():
            kept = None
        else:
            student, weights = student[kept], weights[kept]
            teacher = (
                teacher[kept] if isinstance(teacher, LazyLogits) else teacher.map(lambda t: t[kept])
            )
            ids = ids[kept] if isinstance(ids, Tensor) else ids
    elif weights is not None:
        student, teacher = _without_weightless_rows(student, teacher, weights)
    options = LossOptions(
        k,
        ids,
        objective,
        missing,
        entropy,
        chunk_bytes,
        backend,
        gradient_filter,
        student.shape[-1],
        student.shard,
    )
    with torch.autocast(student.hidden.device.type, enabled=False):
        output = flat_loss(student, teacher, options, weights, reduction, denominator, method)
    return restore(output, kept, leading)


class TopKDistillationLoss(nn.Module):
    """distillation_loss as a module: its options are fixed at construction.

    Args:
        options: the keyword arguments of distillation_loss but token_weights and denominator.
    """

    def __init__(
        self,
        *,
        k: int = 20,
        support: Support = "student",
        objective: Objective = reverse_kl,
        reduction: str = "mean",
        method: str = "auto",
        missing: Missing = "error",
        entropy: bool = False,
        compact: bool = True,
        chunk_bytes: int | None = None,
        backend: str = "auto",
        gradient_filter: float | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }

    def forward(
        self,
        student: LazyLogits,
        teacher: LazyLogits | SparseLogits,
        token_weights: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> DistillationOutput:
        """As distillation_loss."""
        return distillation_loss(
            student, teacher, token_weights=token_weights, denominator=denominator, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _same_vocabulary(
    student: LazyLogits, teacher: LazyLogits | SparseLogits
) -> tuple[LazyLogits, LazyLogits | SparseLogits]:
    if isinstance(teacher, SparseLogits):
        return student, teacher
    vocab_size = min(student.shape[-1], teacher.shape[-1])
    return replace(student, vocab_size=vocab_size), replace(teacher, vocab_size=vocab_size)


def _flat_answer(teacher: SparseLogits, leading: torch.Size) -> SparseLogits:
    dims = len(leading)
    return teacher.map(lambda tensor: tensor.reshape((-1, *tensor.shape[dims:])))


def _is_recorded(weights: Tensor) -> bool:
    """Whether a compiler or a CUDA graph records this call, for other weights to come."""
    if torch.compiler.is_compiling():
        return True
    return weights.is_cuda and torch.cuda.is_current_stream_capturing()


def _without_weightless_rows(
    student: LazyLogits, teacher: LazyLogits | SparseLogits, weights: Tensor
) -> tuple[LazyLogits, LazyLogits | SparseLogits]:
    """Rows of weight 0 that compact=False kept, with hidden states of 0: they may hold NaN."""
    dead = (weights == 0)[:, None]
    student = replace(student, hidden=student.hidden.masked_fill(dead, 0.0))
    if isinstance(teacher, LazyLogits):
        teacher = replace(teacher, hidden=teacher.hidden.masked_fill(dead, 0.0))
    return student, teacher

"""distillation_loss: from two LazyLogits to a scalar, in either order."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from opd_kernels.backends.records import accumulator_dtype
from opd_kernels.divergences import reverse_kl
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.linear.operators import FlatLogits
from opd_kernels.loss.objective import Objective
from opd_kernels.loss.options import LossOptions, Missing, Support, TokenBatch
from opd_kernels.loss.output import DistillationOutput, restore
from opd_kernels.loss.refusals import check_loss, check_support
from opd_kernels.loss.strategy import compute
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
    smaller one: the rest of the larger one counts as padding.

    Args:
        student: hidden [..., D].
        teacher: LazyLogits with the same leading shape, of any width, or SparseLogits [..., K] from
            a server.
        k: size of the support.
        support: S is the top-K of the "student" or the "teacher", their "union" or "intersection",
            the "full" vocabulary, or integer ids [..., K].
        objective: a function (student, teacher) -> loss per token [...] of SparseLogits: a
            divergence, a functools.partial of one, or your own. It is differentiated with respect
            to the student only.
        token_weights: [...] weight of each token's loss, default 1; without gradient.
        reduction: "mean" = sum(w * loss) / denominator, "sum", or "none" (recompute only,
            unweighted).
        denominator: what "mean" divides by, default sum(token_weights). Pass the global number of
            tokens under gradient accumulation or several ranks.
        method: the order. "one_pass" computes the gradient during the forward pass, from token
            chunks [c, V], without recomputation. "recompute" takes vocabulary chunks [N, v] and the
            least memory. "auto" takes the one that costs less by linear/cost_model.py.
        missing: what happens if a served teacher has no value on S: "error", or "drop" the slot
            from S.
        entropy: also return the entropy of student and teacher (of whole rows), from the same pass.
        compact: leave out tokens of weight 0 before the first matrix product. This synchronises
            with the device, so it does not happen under torch.compile or in a CUDA graph.
        chunk_bytes: the most memory for the student's logits at a time, and as much again for the
            teacher's with support="full"; default by the device.
        backend: "auto", or a name of available_backends().
        gradient_filter: leave tokens outside S with a lower probability than this out of the
            gradient. It is an approximation, for one_pass only; the loss stays exact, and
            docs/objectives.md has the measured error. Where the head is split, the k largest logits
            of each rank always stay in the gradient.

    Returns:
        DistillationOutput(loss, per_token, student, teacher, dropped); all but loss are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and the remedy.
    """
    options = LossOptions(
        k, support, objective, reduction, method, missing, entropy, compact, chunk_bytes, backend,
        gradient_filter,
    )  # fmt: skip
    check_loss(student, teacher, options, token_weights, denominator)
    batch, kept = _batch_of(student, teacher, options, token_weights)
    if reduction == "mean":
        denominator = _denominator_of(batch, denominator)
    with torch.autocast(student.hidden.device.type, enabled=False):
        output = compute(batch, denominator)
    return restore(output, kept, student.hidden.shape[:-1])


class TopKDistillationLoss(nn.Module):
    """distillation_loss as a module with fixed options.

    Args:
        options: the keyword arguments of distillation_loss except token_weights and denominator.
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


def _batch_of(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    token_weights: Tensor | None,
) -> tuple[TokenBatch, Tensor | None]:
    """The flat operands of a loss, and the indices of the tokens that are kept, None for all."""
    leading, vocab_size = student.hidden.shape[:-1], student.shape[-1]
    if isinstance(teacher, LazyLogits):
        vocab_size = min(vocab_size, teacher.shape[-1])
    if options.is_full and isinstance(options.k, int):
        options = replace(options, k=min(options.k, vocab_size))  # the ids that are reported
    check_support(student, options, vocab_size)
    flat, support, weights, kept = student.flat(vocab_size), options.support, None, None
    answer: FlatLogits | SparseLogits
    if isinstance(teacher, SparseLogits):
        dims = len(leading)
        answer = teacher.map(lambda tensor: tensor.reshape((-1, *tensor.shape[dims:])))
    else:  # a whole head is cut like the student's only where chunks lie side by side
        answer = teacher.flat(vocab_size, flat.shard if options.is_full else None)
    if isinstance(support, Tensor):
        support = support.reshape(-1, support.shape[-1])
    if token_weights is not None:
        # 16-bit weights would round, or overflow, in their own sum.
        weights = token_weights.detach().reshape(-1)
        weights = weights.to(accumulator_dtype(flat.hidden, flat.head.weight))
        if not options.compact or _is_recorded(weights):
            flat, answer = _without_weightless_rows(flat, answer, weights)
        else:
            kept = weights.nonzero()[:, 0]
            kept = None if kept.numel() == weights.numel() else kept
    if kept is not None and weights is not None:
        flat, weights = flat[kept], weights[kept]
        answer = answer[kept] if isinstance(answer, FlatLogits) else answer.map(lambda t: t[kept])
        support = support[kept] if isinstance(support, Tensor) else support
    return TokenBatch(flat, answer, support, weights, options), kept


def _denominator_of(batch: TokenBatch, denominator: float | Tensor | None) -> float | Tensor:
    """What a mean divides by."""
    if denominator is None:
        if batch.weights is not None:
            return batch.weights.sum()
        # A tensor: with a number a compiled graph would hold for one number of tokens only.
        hidden = batch.student.hidden
        return hidden.new_full((), hidden.shape[0], dtype=torch.int64)
    if isinstance(denominator, Tensor):
        # A copy: the caller may change the tensor before the backward pass.
        return denominator.detach().clone().reshape(())
    return denominator


def _is_recorded(weights: Tensor) -> bool:
    """Whether a compiler or a CUDA graph records this call, to replay it with other weights."""
    if torch.compiler.is_compiling():
        return True
    return weights.is_cuda and torch.cuda.is_current_stream_capturing()


def _without_weightless_rows(
    student: FlatLogits, teacher: FlatLogits | SparseLogits, weights: Tensor
) -> tuple[FlatLogits, FlatLogits | SparseLogits]:
    """Replace the hidden states of rows of weight 0 by 0: they may hold NaN."""
    weightless = (weights == 0)[:, None]
    student = replace(student, hidden=student.hidden.masked_fill(weightless, 0.0))
    if isinstance(teacher, FlatLogits):
        teacher = replace(teacher, hidden=teacher.hidden.masked_fill(weightless, 0.0))
    return student, teacher

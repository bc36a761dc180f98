"""distillation_loss: from two LazyLogits to a scalar, in either order."""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from opd_kernels.backends import resolve_backend
from opd_kernels.backends.records import accumulator_dtype
from opd_kernels.checks import check_reverse_mode
from opd_kernels.divergences import reverse_kl
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.linear.operators import FlatLogits
from opd_kernels.loss import token_walk
from opd_kernels.loss.objective import Objective, weighted_sum
from opd_kernels.loss.options import LossOptions, Missing, Support, TokenBatch
from opd_kernels.loss.output import DistillationOutput
from opd_kernels.loss.refusals import check_loss, check_models, check_support
from opd_kernels.loss.strategy import choose_order, recomputed_loss
from opd_kernels.sparse_logits import SparseLogits, map_rows, scatter, scatter_rows


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
    smaller one: the rest of the larger one counts as padding. A UserWarning says so where padding
    to a multiple cannot explain the difference.

    Args:
        student: hidden [..., D].
        teacher: LazyLogits with the same leading shape, of any width, or SparseLogits [..., K] from
            a server.
        k: size of the support. A GPU backend selects up to 128 (triton) or 256 (cuda) tokens by its
            own kernel, and lets PyTorch select more, which takes longer.
        support: S is the top-K of the "student" or the "teacher", their "union" or "intersection",
            the "full" vocabulary, or integer ids [..., K].
        objective: a function (student, teacher) -> loss per token [...] of SparseLogits: a
            divergence, a functools.partial of one, or your own. It is differentiated with respect
            to the student. Other tensors in it that need a gradient get one with
            method="recompute" and K ids, and are refused otherwise.
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
        gradient_filter: tokens outside S whose probability is below this get no gradient. It is an
            approximation, for one_pass only; the loss stays exact, and
            docs/objectives.md has the measured error. Where the head is split, the k largest logits
            of each rank always stay in the gradient.

    Returns:
        DistillationOutput(loss, per_token, student, teacher, dropped); all but loss are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and the remedy.
        RuntimeError: forward-mode AD or torch.func tracks an argument. Differentiating a gradient
            of the loss raises it too.
    """
    check_models(student, teacher)
    if isinstance(backend, str) and backend == "auto" and not torch.compiler.is_compiling():
        backend = resolve_backend(backend, student.hidden.device)
    options = LossOptions(
        k, support, objective, reduction, method, missing, entropy, compact, chunk_bytes, backend,
        gradient_filter, full=isinstance(support, str) and support == "full",
    )  # fmt: skip
    check_loss(student, teacher, options, token_weights, denominator)
    operands = (student.hidden, student.weight, student.bias)
    check_reverse_mode(*operands, token_weights, denominator)
    batch, kept = _batch_of(student, teacher, options, token_weights)
    if reduction == "mean":
        denominator = _denominator_of(batch, denominator)
    with torch.autocast(student.hidden.device.type, enabled=False):
        output = _compute(batch, denominator)
    return _restored(output, kept, student.hidden.shape[:-1])


def _batch_of(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    token_weights: Tensor | None,
) -> tuple[TokenBatch, Tensor | None]:
    """The flat operands of a loss, and the indices of the tokens that are kept, None for all."""
    leading, head = student.hidden.shape[:-1], student.head
    if isinstance(teacher, LazyLogits) and teacher.head.vocab_size < head.vocab_size:
        head = replace(head, vocab_size=teacher.head.vocab_size)
    vocab_size = head.vocab_size
    if options.full and isinstance(options.k, int):
        options = replace(options, k=min(options.k, vocab_size))  # the ids that are reported
    check_support(student, options, vocab_size)
    flat = FlatLogits.flatten(student.hidden, head)
    support, weights, kept = options.support, None, None
    answer: FlatLogits | SparseLogits
    if isinstance(teacher, SparseLogits):
        dims = len(leading)
        answer = map_rows(teacher.detach(), lambda t: t.reshape((-1, *t.shape[dims:])))
    else:
        head = teacher.head
        if vocab_size < head.vocab_size:
            head = replace(head, vocab_size=vocab_size)
        answer = FlatLogits.flatten(teacher.hidden, head).detach()
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
        if isinstance(answer, FlatLogits):
            answer = answer[kept]
        else:
            answer = map_rows(answer, lambda tensor: tensor[kept])
        support = support[kept] if isinstance(support, Tensor) else support
    # Last, so that ranks exchange the gradients of the kept tokens only.
    if student.shard is not None:
        flat = flat.split(student.shard, whole=False)
    if isinstance(teacher, LazyLogits) and isinstance(answer, FlatLogits):
        # With a full support, chunks of both models lie side by side. So a teacher's head that is
        # not split is split as the student's is.
        shard = teacher.shard or (student.shard if options.full else None)
        if shard is not None:
            answer = answer.split(shard, whole=teacher.shard is None)
    return TokenBatch(flat, answer, support, weights, options), kept


def _compute(batch: TokenBatch, denominator: float | Tensor | None) -> DistillationOutput:
    """The reduced loss of a batch, in the order that the options name or that costs less."""
    options, dropped = batch.options, None
    order = choose_order(batch) if options.method == "auto" else options.method
    if order == "one_pass":
        total, result = _token_walks().one_pass_loss(batch)
        per_token, s, t, dropped = result.per_token, result.student, result.teacher, result.dropped
        return DistillationOutput(_divided(total, denominator), per_token, s, t, dropped)
    if options.full:
        per_token, result = _token_walks().recomputed_full_loss(batch)
        s, t = result.student, result.teacher
    else:
        per_token, s, t = recomputed_loss(batch)
    loss = per_token
    if options.reduction != "none":
        loss = _divided(weighted_sum(per_token, batch.weights), denominator)
    return DistillationOutput(loss, per_token.detach(), s, t)


def _token_walks() -> ModuleType:
    """The module of the walks over tokens; under torch.compile, of walks outside the graph."""
    if torch.compiler.is_compiling():
        from opd_kernels.loss import outside_graphs

        return outside_graphs
    return token_walk


def _divided(total: Tensor, denominator: float | Tensor | None) -> Tensor:
    """total / denominator, and 0 where the denominator is 0; decided on the device."""
    if denominator is None:
        return total
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    quotient = total / divisor.masked_fill(divisor == 0, 1.0)
    return torch.where(divisor == 0, torch.zeros_like(total), quotient)


def _denominator_of(batch: TokenBatch, denominator: float | Tensor | None) -> float | Tensor:
    """The denominator of reduction="mean"."""
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


def _restored(
    output: DistillationOutput, kept: Tensor | None, leading: torch.Size
) -> DistillationOutput:
    """Bring the results of the kept tokens back to the caller's leading shape."""
    if kept is None and len(leading) == 1:
        return output

    return DistillationOutput(
        output.loss if output.loss.dim() == 0 else scatter(output.loss, kept, leading, 0.0),
        scatter(output.per_token, kept, leading, 0.0),
        scatter_rows(output.student, kept, leading),
        scatter_rows(output.teacher, kept, leading),
        None if output.dropped is None else scatter(output.dropped, kept, leading, 0.0),
    )

"""The two orders in which a loss can be computed, and the choice between them."""

from types import ModuleType

import torch
from torch import Tensor

from opd_kernels.backends import select_backend
from opd_kernels.backends.records import accumulator_dtype
from opd_kernels.linear.cost_model import Shape
from opd_kernels.linear.plan import prefers_one_pass
from opd_kernels.linear.products import operand_dtype
from opd_kernels.loss import token_walk
from opd_kernels.loss.objective import loss_on_support
from opd_kernels.loss.options import TokenBatch
from opd_kernels.loss.output import DistillationOutput
from opd_kernels.loss.supports import Recomputed, align_teacher, select_support, source_of
from opd_kernels.sparse_logits import SparseLogits


def compute(batch: TokenBatch, denominator: float | Tensor | None) -> DistillationOutput:
    """The reduced loss of a batch, in the order that the options name or that costs less."""
    options, dropped = batch.options, None
    if _order(batch) == "one_pass":
        total, result = _walks().one_pass_loss(batch)
        per_token, student, teacher = result.per_token, result.student, result.teacher
        loss, dropped = _divided(total, denominator), result.dropped
    else:
        if options.is_full:
            per_token, result = _walks().recomputed_full_loss(batch)
            student, teacher = result.student, result.teacher
        else:
            per_token, student, teacher = _recomputed_loss(batch)
        loss = per_token
        if options.reduction != "none":
            loss = _divided(token_walk.weighted_sum(per_token, batch.weights), denominator)
    return DistillationOutput(loss, per_token.detach(), student, teacher, dropped)


def _recomputed_loss(batch: TokenBatch) -> tuple[Tensor, SparseLogits, SparseLogits]:
    """The loss [N] by the differentiable operators, and both models on S, detached."""
    options, support = batch.options, batch.support
    student, teacher = Recomputed(batch.student, options), source_of(batch.teacher, options)
    wanted, answer = select_support(student, teacher, support, options.k)
    s, t = align_teacher(student.reduce(wanted), answer, teacher, support, options)
    epilogues = None  # a compiler fuses the small kernels of the objective itself
    if not torch.compiler.is_compiling():
        epilogues = select_backend(options.backend, batch.student.hidden.device)
    frozen = None if batch.weights is None else batch.weights == 0
    per_token = loss_on_support(options.objective, s, t, epilogues, frozen)
    return per_token, s.detach(), t


def _walks() -> ModuleType:
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


def _order(batch: TokenBatch) -> str:
    """ "one_pass" or "recompute"."""
    options = batch.options
    if options.method != "auto":
        return options.method
    if options.reduction == "none":
        return "recompute"
    if options.gradient_filter is not None or options.is_full:
        return "one_pass"  # only it can filter; a full support needs chunks of tokens either way
    if torch.compiler.is_compiling():
        return "recompute"
    student, trains = batch.student, torch.is_grad_enabled()
    hidden, weight = student.hidden, student.head.weight
    operand, itemsize = operand_dtype(hidden, weight), accumulator_dtype(hidden, weight).itemsize
    shape = Shape(
        hidden.shape[0],
        hidden.shape[1],
        student.planned_columns,
        options.k,
        operand_bytes=operand.itemsize,
        logit_bytes=itemsize,
        sum_bytes=itemsize,
        dhidden=trains and hidden.requires_grad,
        dweight=trains and weight.requires_grad,
    )
    epilogues = select_backend(options.backend, hidden.device)
    fused = epilogues.fused(operand, student.head, options.k) is not None
    cheaper = prefers_one_pass(shape, hidden.device, options.chunk_bytes, fused)
    return "one_pass" if cheaper else "recompute"

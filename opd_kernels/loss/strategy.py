"""The two orders of walking for the loss of flat operands, and the choice between them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opd_kernels.backends import select_backend
from opd_kernels.backends.head import accumulator_dtype
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.linear.cost_model import Shape
from opd_kernels.linear.plan import prefers_one_pass
from opd_kernels.linear.products import operand_dtype
from opd_kernels.loss.loss_functions import OnePassLoss, RecomputedFullLoss
from opd_kernels.loss.output import DistillationOutput
from opd_kernels.loss.support_loss import support_loss
from opd_kernels.loss.supports import Recomputed, Served, align
from opd_kernels.loss.token_walk import LossOptions, WalkResult, walk
from opd_kernels.sparse_logits import SparseLogits


def flat_loss(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    weights: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    method: str,
) -> DistillationOutput:
    """The reduced loss of student [N, D] in the order that was asked for, or that costs less."""
    if reduction == "mean" and denominator is None:
        tokens = student.hidden.shape[0]
        if weights is None:  # as a tensor, or a compiled graph would be of one number of tokens
            denominator = student.hidden.new_full((), tokens, dtype=torch.int64)
        else:
            denominator = weights.sum()
    if isinstance(denominator, Tensor):  # the caller may go on counting in it before backward
        denominator = denominator.detach().clone().reshape(())
    if reduction != "mean":
        denominator = None

    def reduce(per_token: Tensor) -> Tensor:
        if reduction == "none":
            return per_token
        weighted = per_token
        if weights is not None:
            weighted = (per_token * weights).masked_fill(weights == 0, 0.0)
        return _divide(weighted.sum(), denominator)

    if _resolve_method(student, options, reduction, method) == "one_pass":
        if torch.compiler.is_compiling():
            from opd_kernels.loss import outside_graphs

            return outside_graphs.one_pass(student, teacher, options, weights, reduce, denominator)
        return one_pass_loss(student, teacher, options, weights, reduce, denominator)
    return _recompute(student, teacher, options, reduce, weights)


def one_pass_loss(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    weights: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
    denominator: float | Tensor | None,
) -> DistillationOutput:
    """The loss and its gradient in one walk over chunks of tokens."""
    student = student.local()
    if not student.requires_grad:
        result = walk(student, teacher, options, None, (False, False, False))
        return DistillationOutput(
            reduce(result.per_token), result.per_token, result.student, result.teacher
        )

    def run(needs: tuple[bool, bool, bool]) -> WalkResult:
        upstream = student.hidden.new_ones(
            student.hidden.shape[0], dtype=accumulator_dtype(student.hidden, student.weight)
        )
        return walk(
            student, teacher, options, upstream if weights is None else upstream * weights, needs
        )

    results: list[WalkResult] = []
    loss = OnePassLoss.apply(
        student.hidden,
        student.weight,
        student.bias,
        student,
        run,
        reduce,
        lambda gradient: _divide(gradient, denominator),
        results,
    )
    result = results[0]
    return DistillationOutput(
        loss, result.per_token, result.student, result.teacher, result.dropped
    )


def _recompute(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    reduce: Callable[[Tensor], Tensor],
    weights: Tensor | None,
) -> DistillationOutput:
    if isinstance(options.support, str) and options.support == "full":
        if torch.compiler.is_compiling():
            from opd_kernels.loss import outside_graphs

            per_token, s, t = outside_graphs.recompute_full(student, teacher, options)
        else:
            per_token, s, t = recompute_full_loss(student, teacher, options)
    else:
        source = Recomputed(student, options.entropy, options.chunk_bytes, options.backend)
        target: Recomputed | Served
        if isinstance(teacher, SparseLogits):
            target = Served(teacher)
        else:
            target = replace(source, logits=teacher.detach())
        s, t = align(source, target, options.support, options.k, options.missing)
        epilogues = None  # a compiler fuses the small kernels of the loss itself
        if not torch.compiler.is_compiling():
            epilogues = select_backend(options.backend, student.hidden.device)
        frozen = None if weights is None else weights == 0
        per_token = support_loss(s, t.detach(), options.objective, epilogues, frozen)
    return DistillationOutput(reduce(per_token), per_token.detach(), s.detach(), t.detach())


def recompute_full_loss(
    student: LazyLogits, teacher: LazyLogits | SparseLogits, options: LossOptions
) -> tuple[Tensor, SparseLogits, SparseLogits]:
    """The loss [N] over whole rows, whose backward walks them again; and both models on S."""
    student = student.local()

    def run(upstream: Tensor | None, needs: tuple[bool, bool, bool]) -> WalkResult:
        return walk(student, teacher, options, upstream, needs)

    results: list[WalkResult] = []
    assert isinstance(teacher, LazyLogits)
    theirs = (teacher.hidden, teacher.weight, teacher.bias)
    per_token = RecomputedFullLoss.apply(
        student.hidden, student.weight, student.bias, student, theirs, run, results
    )
    return per_token, results[0].student, results[0].teacher


def _divide(total: Tensor, denominator: float | Tensor | None) -> Tensor:
    """total / denominator, and 0 where the denominator is 0; decided on the device."""
    if denominator is None:
        return total
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return torch.where(
        divisor == 0, torch.zeros_like(total), total / divisor.masked_fill(divisor == 0, 1.0)
    )


def _resolve_method(student: LazyLogits, options: LossOptions, reduction: str, method: str) -> str:
    if method != "auto":
        return method
    if reduction == "none":
        return "recompute"
    if options.gradient_filter is not None:
        return "one_pass"
    if isinstance(options.support, str) and options.support == "full":
        return "one_pass"  # chunks of tokens either way
    if torch.compiler.is_compiling():
        return "recompute"
    hidden, weight = student.hidden, student.weight
    operand, trains = operand_dtype(hidden, weight), torch.is_grad_enabled()
    itemsize = accumulator_dtype(hidden, weight).itemsize
    shape = Shape(
        hidden.shape[0],
        hidden.shape[1],
        options.columns,
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

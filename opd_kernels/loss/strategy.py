"""The choice between the two orders, and the recompute order on a support of K ids."""

import torch
from torch import Tensor

from opd_kernels.backends import select_backend
from opd_kernels.backends.records import accumulator_dtype
from opd_kernels.linear.cost_model import Shape
from opd_kernels.linear.plan import prefers_one_pass
from opd_kernels.linear.products import operand_dtype
from opd_kernels.loss.objective import loss_on_support
from opd_kernels.loss.options import TokenBatch
from opd_kernels.loss.supports import Recomputed, align_teacher, select_support, source_of
from opd_kernels.sparse_logits import SparseLogits


def choose_order(batch: TokenBatch) -> str:
    """The order that method="auto" takes: the one that the options need, or that costs less."""
    options = batch.options
    if options.reduction == "none":
        return "recompute"
    if options.gradient_filter is not None or options.full:
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


def recomputed_loss(batch: TokenBatch) -> tuple[Tensor, SparseLogits, SparseLogits]:
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

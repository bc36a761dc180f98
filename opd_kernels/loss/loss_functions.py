"""The token walk as autograd functions: gradient at once, or when it is asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.token_walk import WalkResult


class OnePassLoss(torch.autograd.Function):
    """sum_n weights_n * loss_n / denominator; the gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: LazyLogits,
        run: Callable[[tuple[bool, bool, bool]], WalkResult],
        reduce: Callable[[Tensor], Tensor],
        divide: Callable[[Tensor], Tensor],
        results: list[WalkResult],
    ) -> Tensor:
        result = run(ctx.needs_input_grad[:3])
        results.append(result)
        ctx.gradients, ctx.student, ctx.divide = result.gradients, student.detach(), divide
        return reduce(result.per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "distillation_loss: the one_pass gradient was used up by an earlier backward; "
                "call backward once, or use method='recompute'"
            )
        # The denominator is applied here, in the accumulator's dtype, never in a 16-bit gradient.
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(ctx.divide(dloss), ctx.student), None, None, None, None, None)


class RecomputedFullLoss(torch.autograd.Function):
    """The loss per token [N] over the whole vocabulary; backward walks the token chunks again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: LazyLogits,
        teacher_operands: tuple[Tensor | None, ...],
        run: Callable[[Tensor | None, tuple[bool, bool, bool]], WalkResult],
        results: list[WalkResult],
    ) -> Tensor:
        result = run(None, (False, False, False))
        results.append(result)
        # An inference tensor cannot be saved, nor changed in place outside of inference mode.
        theirs = [t for t in teacher_operands if t is not None and not t.is_inference()]
        ctx.save_for_backward(hidden, weight, bias, *theirs)
        ctx.student, ctx.run = student.detach(), run
        return result.per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dper_token: Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors  # raises if an operand was modified in place since
        gradients = ctx.run(dper_token.contiguous(), ctx.needs_input_grad[:3]).gradients
        return (*gradients.scaled(None, ctx.student), None, None, None, None)

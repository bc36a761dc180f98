"""Derivatives that the package does not have: the second one, and any in forward mode.

The operators and walks compute the first derivative in reverse mode, with kernels that PyTorch does
not see. Without the checks here PyTorch would take their results for constants, and a gradient
penalty or a tangent would be missing without an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd import forward_ad

_NO_SECOND = (
    "opd_kernels: the gradient of a loss has no autograd formula, so it cannot be differentiated "
    "again; compute gradient penalties and Hessians from the logits of LazyLogits.materialize()"
)
_REVERSE_MODE_ONLY = (
    "opd_kernels: topk, gather, log_prob and distillation_loss have no derivative in forward mode "
    "or under torch.func; use backward() or torch.autograd.grad, or differentiate the logits of "
    "LazyLogits.materialize()"
)


def refuse_second_backward(ctx: Any, *gradients: Any) -> Any:
    """Raise RuntimeError: the backward of a function that computes a gradient."""
    raise RuntimeError(_NO_SECOND)


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate the backward of an autograd function, so that differentiating its result raises.

    The function saves the tensors that its gradient depends on. PyTorch's once_differentiable is
    not enough. It returns constants where the upstream gradient is a constant, as that of a scalar
    loss is, and its error is not reached by torch.autograd.grad with respect to an operand.
    """

    @wraps(backward)
    def run(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # without create_graph=True
            return gradients
        sources = [x for x in (*upstream, *ctx.saved_tensors) if isinstance(x, Tensor)]
        return tuple(None if g is None else _Gradient.apply(g, *sources) for g in gradients)

    return run


def refuse_transforms(*values: Any) -> None:
    """Raise RuntimeError if forward-mode AD or torch.func tracks one of the values.

    Custom operators and what runs under no_grad would drop a tangent.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    if forward_ad._current_level >= 0:  # inside forward_ad.dual_level, jvp or jacfwd
        _Operands.apply(*tensors)
    if not torch.compiler.is_compiling() and any(map(is_gradtrackingtensor, tensors)):
        raise RuntimeError(_REVERSE_MODE_ONLY)


def refuse_other_sources(loss: Tensor, *leaves: Tensor) -> None:
    """Raise ValueError if a loss has a gradient with respect to more than these leaves.

    The walks over tokens differentiate an objective with respect to the student only, so a tensor
    of the objective's own, such as a learned factor, would get no gradient.
    """
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # a leaf, at the node that adds to its grad
        if variable is not None and all(variable is not leaf for leaf in leaves):
            raise ValueError(
                "objective: expected a loss of student and teacher alone, got one that depends on "
                f"another tensor that needs a gradient, of shape {tuple(variable.shape)}; detach "
                "it, or use method='recompute' with a support of K ids"
            )
        nodes += [function for function, _ in node.next_functions]


class _Gradient(torch.autograd.Function):
    """A gradient that depends on `sources`; differentiating it with respect to them raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(refuse_second_backward)


class _Operands(torch.autograd.Function):
    """PyTorch calls its jvp, which raises, if an operand has a tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*operands: Tensor) -> Tensor:
        return operands[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_REVERSE_MODE_ONLY)

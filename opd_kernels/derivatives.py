"""Derivatives that the package lacks: second ones, and those of other tensors in an objective.

The operators and walks compute gradients with kernels that PyTorch does not see. Without the checks
here PyTorch would take their results for constants, and a term of a gradient would be missing
without an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NO_SECOND = (
    "opd_kernels: the gradient of a loss has no autograd formula, so it cannot be differentiated "
    "again; compute gradient penalties and Hessians from the logits of LazyLogits.materialize()"
)


def refuse_second_backward(ctx: Any, *gradients: Any) -> Any:
    """Raise RuntimeError: the backward of a function that computes a gradient."""
    raise RuntimeError(_NO_SECOND)


def differentiable_once(
    backward: Callable[..., tuple[Any, ...]], ctx: Any, *upstream: Any
) -> tuple[Any, ...]:
    """The gradients that an autograd function's backward returns under create_graph=True.

    Differentiating them with respect to the upstream gradients, or to the tensors that the function
    has saved, raises. PyTorch's once_differentiable is not enough. It returns constants where the
    upstream gradient is a constant, as that of a scalar loss is, and its error is not reached by
    torch.autograd.grad with respect to an operand.
    """
    with torch.no_grad():
        gradients = backward(ctx, *upstream)
    sources = [x for x in (*upstream, *ctx.saved_tensors) if isinstance(x, Tensor)]
    return tuple(None if g is None else _Gradient.apply(g, *sources) for g in gradients)


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

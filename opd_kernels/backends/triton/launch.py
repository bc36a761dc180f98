"""What every launch needs of a head: its operands and flags."""

from typing import Any

from torch import Tensor

from opd_kernels.backends.head import Head


def operands(
    head: Head, first_id: int, columns: int, placeholder: Tensor
) -> tuple[Tensor, float, float]:
    """The bias of some columns, or the placeholder, and the two scalars of elementwise.py."""
    bias = placeholder
    if head.bias is not None:
        bias = head.bias.detach()[first_id : first_id + columns].contiguous()
    return bias, *head.factors


def flags(head: Head) -> dict[str, Any]:
    """The compile-time arguments that say what a head has."""
    return {"HAS_BIAS": head.bias is not None, "CAPPED": head.softcap is not None}


def is_plain(head: Head) -> bool:
    """Whether a logit is its product times a scalar."""
    return head.bias is None and head.softcap is None

"""What every launch passes of a head: its operands, and the compile-time flags of its options."""

from typing import Any

from torch import Tensor

from opd_kernels.backends.records import Head


def head_operands(
    head: Head, first_id: int, columns: int, placeholder: Tensor
) -> tuple[Tensor, float, float]:
    """The bias of some columns and the head's two factors (elementwise.py).

    Without a bias a kernel gets the placeholder and never reads it.
    """
    bias = head.bias_of(first_id, columns)
    _, inner, outer = head.factors
    return placeholder if bias is None else bias, inner, outer


def flags(head: Head) -> dict[str, Any]:
    """The compile-time arguments that say which options a head has."""
    return {"HAS_BIAS": head.bias is not None, "CAPPED": head.factors[0]}

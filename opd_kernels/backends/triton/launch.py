"""What every launch needs: the head's operands and flags, and the device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from opd_kernels.head import Head


def operands(
    head: Head, first_id: int, columns: int, placeholder: Tensor
) -> tuple[Tensor, float, float]:
    """The bias of some columns, or the placeholder, and the two scalars of elementwise.py."""
    bias = placeholder
    if head.bias is not None:
        bias = head.bias.detach()[first_id : first_id + columns].contiguous()
    if head.softcap is None:
        return bias, 1.0, head.scale / head.temperature
    return bias, head.scale / head.softcap, head.softcap / head.temperature


def flags(head: Head) -> dict[str, Any]:
    """The compile-time arguments that say what a head has."""
    return {"HAS_BIAS": head.bias is not None, "CAPPED": head.softcap is not None}


def is_plain(head: Head) -> bool:
    """Whether a logit is its product times a scalar."""
    return head.bias is None and head.softcap is None


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

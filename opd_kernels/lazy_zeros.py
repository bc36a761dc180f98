"""Zeros that cost nothing until they are touched."""

import mmap

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20


def lazy_zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the tensor's shape, on fresh pages of the operating system where they are large.

    Such pages read as zero and become memory when they are written. A gradient [V, D] of which few
    rows are not zero would else spend nearly all of its time on being filled (docs/log.md).
    """
    size = tensor.numel() * dtype.itemsize
    on_cpu = tensor.device.type == "cpu" and tensor.is_contiguous()
    if not on_cpu or size < _LEAST_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros_like(tensor, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape)

"""Keeping a chunk of gradients in float16's range."""

import torch
from torch import Tensor

from opd_kernels.backends.head import Head


def unit_of(
    dtype: torch.dtype, head: Head, largest_exponent: int, *gradients: Tensor
) -> Tensor | None:
    """The power of two to divide gradients wrt final logits by before they become a chunk of
    gradients wrt raw products in float16: those of a mean over many tokens would flush to 0 there,
    and those of a scaled loss overflow. The largest entry comes to at most 2^largest_exponent.
    None for other dtypes.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in gradients])
    largest = largest.amax() * abs(head.scale / head.temperature)  # of what a softcap lessens
    exponent = torch.frexp(largest).exponent - largest_exponent
    usable = largest.isfinite() & (largest > 0)
    return torch.exp2(torch.where(usable, exponent, 0).to(gradients[0].dtype))

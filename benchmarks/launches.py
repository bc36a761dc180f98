"""Calls of the package's epilogues at the size of a real head.

The audit compiles them; the tuner and the comparison of backends time them. On the device "meta"
nothing is computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, Head, Operands, RowGradient, RowState
from opd_kernels.backends.triton import TritonEpilogues
from opd_kernels.backends.triton.linear import TritonFusedEpilogues

TOKENS, VOCAB = 2_048, 151_936
Call = Callable[[], object]
TRITON, FUSED = TritonEpilogues(), TritonFusedEpilogues()


def _head(plain: bool, weight: Tensor) -> Head:
    """Return a head; with bias and softcap unless plain."""
    if plain:
        return Head(weight, None, None, 1.0, 1.0, VOCAB)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16, device=weight.device)
    return Head(weight, bias, 30.0, 1.0, 1.0, VOCAB)


def _chunk(plain: bool, dtype: torch.dtype, device: str) -> Chunk:
    raw = 4 * torch.randn(TOKENS, VOCAB, device=device, dtype=torch.float32)
    return Chunk(raw.to(dtype), _head(plain, torch.empty(VOCAB, 1, device=device)))


def _rows(k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [N, K], values [N, K] and one value per row [N]."""
    values = torch.randn(TOKENS, k, device=device)
    return torch.randint(VOCAB, (TOKENS, k), device=device), values, values[:, 0].contiguous()


def update(
    k: int,
    selects: bool,
    plain: bool,
    device: str,
    dtype: torch.dtype = torch.float32,
    epilogues: Epilogues = TRITON,
) -> Call:
    """Update the row state from one chunk; with entropy unless plain."""
    chunk = _chunk(plain, dtype, device)
    ids, _, like = _rows(k, device)

    def call() -> None:
        if selects:
            state = RowState.for_topk(TOKENS, k, not plain, like)
        else:
            state = RowState.for_ids(ids, not plain, like)
        epilogues.update(chunk, state)

    return call


def gradient(
    k: int,
    plain: bool,
    device: str,
    dtype: torch.dtype = torch.float32,
    epilogues: Epilogues = TRITON,
) -> Call:
    """Turn a chunk of logits into its gradient in bf16."""
    chunk = _chunk(plain, dtype, device)
    ids, values, rows = _rows(k, device)
    out = torch.empty_like(chunk.raw, dtype=torch.bfloat16)
    return lambda: epilogues.gradient(chunk, RowGradient(ids, values, rows, rows), out)


def divergence(beta: float, plain: bool, device: str, epilogues: Epilogues = TRITON) -> Call:
    """Loss and gradient over the whole vocabulary, from the logits of both models."""
    chunk = _chunk(plain, torch.float32, device)
    _, _, upstream = _rows(1, device)
    out = torch.empty_like(chunk.raw, dtype=torch.bfloat16)
    return lambda: epilogues.divergence(chunk, chunk, beta, upstream, out)


def reverse_kl(k: int, plain: bool, device: str) -> Call:
    """Loss and gradient on the support; with the tail bucket unless plain."""
    _, values, rows = _rows(k, device)
    models = (values, rows, values, rows)
    return lambda: TRITON.reverse_kl(*models, stop_gradient=plain, bucket=not plain)


def _operands(dim: int, plain: bool, device: str) -> tuple[Tensor, Head]:
    hidden = torch.randn(TOKENS, dim, device=device).bfloat16()
    weight = torch.randn(VOCAB, dim, device=device).mul_(dim**-0.5).bfloat16()
    return hidden, _head(plain, weight)


def linear_update(k: int, plain: bool, device: str, dim: int = 1_024) -> Call:
    """Matrix product fused with a gather of given ids; with entropy unless plain."""
    hidden, head = _operands(dim, plain, device)
    ids, _, like = _rows(k, device)
    return lambda: FUSED.update(Operands(hidden, head), RowState.for_ids(ids, not plain, like))


def linear_gradient(k: int, plain: bool, device: str, dim: int = 1_024) -> Call:
    """Matrix product fused with the gradient, for a chunk of 16,384 columns."""
    hidden, head = _operands(dim, plain, device)
    ids, values, rows = _rows(k, device)
    out = torch.empty(TOKENS, 16_384, dtype=torch.bfloat16, device=device)

    def call() -> None:
        support = FUSED.support(ids, Operands(hidden, head))
        FUSED.gradient(
            Operands(hidden, head), 0, support, RowGradient(ids, values, rows, rows), out
        )

    return call

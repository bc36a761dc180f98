"""How much of the logits lives at a time, from the shape and a memory budget.

Two costs decide. In the one-pass order every token chunk reads and writes the whole [V, D] gradient
of the weight, so a chunk must hold enough rows to pay for that; below that, recomputing the logits
is cheaper. In the recompute order every vocabulary chunk reads and writes the [N, D] gradient of
the hidden states, so a chunk must hold enough columns. The measurements are in docs/log.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_COLUMNS = 4096
# Rows of a chunk that start at a multiple of a vector's size multiply up to a quarter faster.
_ALIGNMENT = 64
_MIB = 1 << 20


@dataclass(frozen=True)
class _Limits:
    budget: int  # bytes of logits that may live at a time, unless the user sets chunk_bytes
    recompute_chunk: int  # bytes past which a recompute chunk buys nothing
    one_pass_rows: int  # rows below which one_pass loses to recompute


_LIMITS = {
    "cpu": _Limits(budget=192 * _MIB, recompute_chunk=24 * _MIB, one_pass_rows=128),
    "cuda": _Limits(budget=1536 * _MIB, recompute_chunk=256 * _MIB, one_pass_rows=2048),
}


def _limits(device: torch.device) -> _Limits:
    return _LIMITS["cpu" if device.type == "cpu" else "cuda"]


def _even_size(total: int, most: int) -> int:
    """The size of equal pieces of `total`, none over `most`."""
    pieces = -(-total // max(1, most))
    return -(-total // max(1, pieces))


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def _budget(device: torch.device, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        return _limits(device).budget
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(
            f"chunk_bytes: expected a positive number of bytes or None, got {chunk_bytes!r}; it "
            "bounds the memory for logits that live at a time"
        )
    return chunk_bytes


def recompute_sizes(
    tokens: int, vocab: int, itemsize: int, device: torch.device, chunk_bytes: int | None
) -> tuple[int, int]:
    """Rows and columns of a logits chunk in the recompute order."""
    budget = min(_budget(device, chunk_bytes), _limits(device).recompute_chunk) // itemsize
    most = max(MIN_COLUMNS, budget // max(tokens, 1) // _ALIGNMENT * _ALIGNMENT)
    columns = min(vocab, _aligned(_even_size(vocab, most)))
    rows = _even_size(tokens, max(1, budget // columns))
    return rows, columns


def chunk_buffer(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits [rows, columns] whose rows start at multiples of _ALIGNMENT."""
    return like.new_empty((rows, _aligned(columns)), dtype=dtype)[:, :columns]


def one_pass_rows(
    tokens: int, vocab: int, itemsize: int, device: torch.device, chunk_bytes: int | None
) -> int:
    """Rows of a logits chunk in the one-pass order: as many as the budget holds, or one."""
    return _even_size(tokens, _budget(device, chunk_bytes) // (_aligned(vocab) * itemsize))


def prefers_one_pass(
    tokens: int, vocab: int, itemsize: int, device: torch.device, chunk_bytes: int | None
) -> bool:
    """Whether the budget holds enough rows for one_pass to beat recompute."""
    rows = one_pass_rows(tokens, vocab, itemsize, device, chunk_bytes)
    return rows >= min(tokens, _limits(device).one_pass_rows)

"""Chunks of logits for tests of backends, including layouts that the walks do not produce."""

import torch

from opd_kernels.backends.records import Chunk, Head, RowState
from opd_kernels.sparse_logits import canonical_ids
from tests.device import DEVICE
from tests.reference import head_in_float64


def make_chunk(rows, columns, dtype=torch.float32, options=(), spread=3.0):
    """Return raw products [rows, columns] with a row stride of columns + 3, and their head."""
    raw = (torch.randn(rows, columns + 3, device=DEVICE) * spread).to(dtype)[:, :columns]
    options = set(options)
    bias = torch.randn(columns + 5, device=DEVICE).to(dtype) if "bias" in options else None
    softcap = 4.0 if "softcap" in options else None
    scale, temperature = (-1.5, 0.7) if "scale" in options else (1.0, 1.0)
    weight = torch.empty(columns + 5, 1, device=DEVICE)
    return raw, Head(weight, bias, softcap, scale, temperature, columns)


def state_of(backend, raw, head, k_or_ids, entropy=True, pieces=1):
    """Return the row state after updates with the chunk's columns in `pieces` pieces."""
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    if isinstance(k_or_ids, int):
        state = RowState.for_topk(raw.shape[0], k_or_ids, entropy, like)
    else:
        state = RowState.for_ids(canonical_ids(k_or_ids, raw.shape[1]), entropy, like)
    width = -(-raw.shape[1] // pieces)
    for first in range(0, raw.shape[1], width):
        backend.update(Chunk(raw[:, first : first + width], head, first), state)
    return state


def in_float64(raw, head):
    return raw.double(), head_in_float64(head)


def assert_no_worse(actual, same_dtype, reference):
    """Assert that the rms error is at most twice PyTorch's in the same dtype, or twice a rounding
    of the largest value, since few numbers may be exact by luck. Infinities must match.
    """
    finite = reference.isfinite()
    assert torch.equal(actual.double()[~finite], reference[~finite])
    expected = reference[finite]

    def rms(values):
        return (values.double()[finite] - expected).square().mean().sqrt()

    rounding = torch.finfo(actual.dtype).eps / 2 * expected.abs().max()
    assert rms(actual) <= 2 * torch.maximum(rms(same_dtype), rounding)


def statistics(state):
    return state.values, state.tail(), state.entropy()

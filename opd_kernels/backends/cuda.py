"""The epilogues in CUDA C++ (csrc/cuda), for chunks of float32, float64, bfloat16 and float16."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import extensions
from opd_kernels.backends.devices import capability, device_of
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, RowGradient, RowState, accumulator_dtype

# Rows of more columns get a whole block of threads instead of a warp: a warp's share of such a row
# takes long compared to the merging of eight lists. Estimated, not measured.
_LONG_ROW = 8_192
_PARTIAL_BYTES = 16 << 20


@cache
def load_extension() -> Any:
    """The CUDA extension, or None if it is not built."""
    return extensions.load("cuda", "_cuda")


def runs_on(device: torch.device) -> bool:
    """Whether the extension has code for a device: OPD_CUDA_ARCHITECTURES may have left it out."""
    return device.type == "cuda" and capability(device) >= load_extension().LEAST_CAPABILITY


class CudaEpilogues(Epilogues):
    """Epilogues that an extension with the interface of csrc/cuda/bindings.cpp computes."""

    # filtered_gradient is PyTorch's: the number of entries that are kept depends on the data.

    def __init__(self, extension: Any, long_row: int = _LONG_ROW) -> None:
        self.extension = extension
        self.max_selected, self.max_given = extension.MAX_SELECTED, extension.MAX_GIVEN
        self._long_row = long_row

    def update(self, chunk: Chunk, state: RowState) -> None:
        if not self.covers(chunk, state.ids.shape[1], state.selects):
            return super().update(chunk, state)
        raw = chunk.raw
        with device_of(raw):
            self.extension.update(
                raw, chunk.first_id, *_head(chunk), state.values, state.ids,
                state.selects, state.max, state.sum, state.moment,
                raw.shape[1] > self._long_row, _stream(raw),
            )  # fmt: skip

    def gradient(self, chunk: Chunk, gradient: RowGradient, out: Tensor) -> None:
        raw = chunk.raw
        if not (self.covers(chunk, gradient.ids.shape[1]) and _can_write(raw, out)):
            return super().gradient(chunk, gradient, out)
        with device_of(raw):
            self.extension.gradient(
                raw, chunk.first_id, *_head(chunk), *gradient.contiguous(), out, _stream(raw)
            )

    def sparse_backward(
        self,
        ids: Tensor,
        coefficients: Tensor,
        hidden: Tensor,
        weight: Tensor,
        dhidden: Tensor | None,
        dweight: Tensor | None,
    ) -> None:
        if ids.numel() == 0:
            return
        ids, coefficients = ids.contiguous(), coefficients.contiguous()
        dense = (weight if dhidden is not None else None, hidden if dweight is not None else None)
        if not all(t is None or _can_multiply(t, coefficients) for t in dense):
            return super().sparse_backward(ids, coefficients, hidden, weight, dhidden, dweight)
        with device_of(ids):
            stream = _stream(ids)
            if dhidden is not None:
                with _contiguous(dhidden) as sums:
                    self.extension.sparse_product(ids, coefficients, weight, sums, stream)
            if dweight is not None:
                # The stable sort adds to every row of dweight in the order of the tokens.
                in_order, order = ids.flatten().sort(stable=True)
                entries = (in_order, order // ids.shape[1], coefficients.flatten()[order])
                # Each call keeps one row of partial sums for PIECE entries.
                rows = max(1, _PARTIAL_BYTES // (hidden.shape[1] * coefficients.element_size()))
                parts = (t.split(rows * self.extension.PIECE) for t in entries)
                with _contiguous(dweight) as sums:
                    for part in zip(*parts, strict=True):
                        self.extension.sparse_scatter(*part, hidden, sums, stream)

    def divergence(
        self, chunk: Chunk, teacher: Chunk, beta: float, upstream: Tensor | None, out: Tensor
    ) -> Tensor:
        raw = chunk.raw
        covered = self.covers(chunk, 0) and self.covers(teacher, 0)
        if not (covered and _can_write(raw, out)):
            return super().divergence(chunk, teacher, beta, upstream, out)
        loss = raw.new_empty(raw.shape[0], dtype=accumulator_dtype(raw))
        upstream = None if upstream is None else upstream.contiguous()
        with device_of(raw):
            self.extension.divergence(
                raw, *_head(chunk), teacher.raw, *_head(teacher), beta, upstream, loss, out,
                _stream(raw),
            )  # fmt: skip
        return loss


def _head(chunk: Chunk) -> tuple[Tensor | None, bool, float, float]:
    return chunk.head_operands(accumulator_dtype(chunk.raw))


def _can_multiply(dense: Tensor, coefficients: Tensor) -> bool:
    """Whether a kernel multiplies `dense`: its rows are contiguous and its dtype is as wide."""
    is_wide = dense.dtype == torch.float64
    has_rows = dense.stride(1) == 1 and dense.stride(0) >= dense.shape[1]
    return has_rows and is_wide == (coefficients.dtype == torch.float64)


def _can_write(raw: Tensor, out: Tensor) -> bool:
    """Whether a kernel reads a chunk of one dtype and writes a gradient of the other."""
    is_narrowed = raw.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    return raw.dtype == out.dtype or is_narrowed


@contextmanager
def _contiguous(sums: Tensor) -> Iterator[Tensor]:
    """Yield the sums, or a contiguous copy that is written back afterwards."""
    same = sums.contiguous()
    yield same
    if same is not sums:
        sums.copy_(same)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0

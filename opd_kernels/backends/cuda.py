"""The epilogues in CUDA C++ (csrc/cuda), for chunks of float32, float64, bfloat16 and float16."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import torch as definition
from opd_kernels.backends.devices import capability, device_of
from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.backends.state import RowState

# Columns above which a row is worth a whole block of threads: by reckoning, not by a measurement, a
# warp's share of it is then long beside the merging of eight lists.
_LONG_ROW = 8_192
_PARTIAL_BYTES = 16 << 20


@cache
def load_extension() -> Any:
    """The extension, or None where it is not built; one that cannot be loaded raises."""
    name = "opd_kernels._cuda"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def runs_on(device: torch.device) -> bool:
    """Whether the extension has code for a device: OPD_CUDA_ARCHITECTURES may have left it out."""
    return device.type == "cuda" and capability(device) >= load_extension().LEAST_CAPABILITY


class CudaEpilogues:
    """Epilogues that an extension with the interface of csrc/cuda/bindings.cpp computes."""

    def __init__(self, extension: Any, long_row: int = _LONG_ROW) -> None:
        self.extension = extension
        self._long_row = long_row

    def update(self, chunk: Tensor, first_id: int, head: Head, state: RowState) -> None:
        """As in backends/torch.py."""
        k, columns = state.ids.shape[1], chunk.shape[1]
        extension = self.extension
        if k > (extension.MAX_SELECTED if state.selects else extension.MAX_GIVEN):
            return definition.update(chunk, first_id, head, state)
        with device_of(chunk):
            extension.update(
                chunk, first_id, *_head(chunk, first_id, head), state.values, state.ids,
                state.selects, state.max, state.sum, state.moment, columns > self._long_row,
                _stream(chunk),
            )  # fmt: skip

    def gradient(
        self,
        chunk: Tensor,
        first_id: int,
        head: Head,
        ids: Tensor,
        dvalues: Tensor,
        tail: Tensor,
        dtail: Tensor,
        out: Tensor,
    ) -> None:
        """As in backends/torch.py."""
        if ids.shape[1] > self.extension.MAX_GIVEN or not _writes(chunk, out):
            return definition.gradient(chunk, first_id, head, ids, dvalues, tail, dtail, out)
        rows = (t.contiguous() for t in (ids, dvalues, tail, dtail))
        with device_of(chunk):
            self.extension.gradient(
                chunk, first_id, *_head(chunk, first_id, head), *rows, out, _stream(chunk)
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
        """As in backends/torch.py."""
        if ids.numel() == 0:
            return
        ids, coefficients = ids.contiguous(), coefficients.contiguous()
        dense = (weight if dhidden is not None else None, hidden if dweight is not None else None)
        if not all(t is None or _is_multiplied(t, coefficients) for t in dense):
            return definition.sparse_backward(ids, coefficients, hidden, weight, dhidden, dweight)
        with device_of(ids):
            stream = _stream(ids)
            if dhidden is not None:
                with _contiguous(dhidden) as sums:
                    self.extension.sparse_product(ids, coefficients, weight, sums, stream)
            if dweight is not None:
                # Stable, so that every row of dweight is summed in the order of the tokens.
                in_order, order = ids.flatten().sort(stable=True)
                entries = (in_order, order // ids.shape[1], coefficients.flatten()[order])
                # A call keeps a row of partial sums for so many entries.
                rows = max(1, _PARTIAL_BYTES // (hidden.shape[1] * coefficients.element_size()))
                parts = (t.split(rows * self.extension.PIECE) for t in entries)
                with _contiguous(dweight) as sums:
                    for part in zip(*parts, strict=True):
                        self.extension.sparse_scatter(*part, hidden, sums, stream)

    def divergence(
        self,
        chunk: Tensor,
        head: Head,
        teacher_chunk: Tensor,
        teacher_head: Head,
        beta: float,
        upstream: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """As in backends/torch.py."""
        if not _writes(chunk, out):
            pair = (chunk, head, teacher_chunk, teacher_head)
            return definition.divergence(*pair, beta, upstream, out)
        loss = chunk.new_empty(chunk.shape[0], dtype=accumulator_dtype(chunk))
        upstream = None if upstream is None else upstream.contiguous()
        heads = _head(chunk, 0, head), _head(teacher_chunk, 0, teacher_head)
        with device_of(chunk):
            self.extension.divergence(
                chunk, *heads[0], teacher_chunk, *heads[1], beta, upstream, loss, out,
                _stream(chunk),
            )  # fmt: skip
        return loss

    # What is kept has a size that only the data tells: PyTorch finds it.
    filtered_gradient = staticmethod(definition.filtered_gradient)
    reverse_kl = staticmethod(definition.reverse_kl)
    fused = staticmethod(definition.fused)


def _is_multiplied(dense: Tensor, coefficients: Tensor) -> bool:
    """Whether its products are in the dtype of the coefficients, and its rows apart."""
    is_wide = dense.dtype == torch.float64
    has_rows = dense.stride(1) == 1 and dense.stride(0) >= dense.shape[1]
    return has_rows and is_wide == (coefficients.dtype == torch.float64)


def _head(chunk: Tensor, first_id: int, head: Head) -> tuple[Tensor | None, bool, float, float]:
    """bias [v] of the chunk's columns in the accumulator dtype, whether the head is capped, and the
    two factors of csrc/cuda/head.cuh.
    """
    bias = head.bias
    if bias is not None:
        bias = bias.detach()[first_id : first_id + chunk.shape[1]].to(accumulator_dtype(chunk))
        bias = bias.contiguous()
    return bias, head.softcap is not None, *head.factors


@contextmanager
def _contiguous(sums: Tensor) -> Iterator[Tensor]:
    """What is added to it is added to the sums, whatever their strides."""
    same = sums.contiguous()
    yield same
    if same is not sums:
        sums.copy_(same)


def _writes(chunk: Tensor, out: Tensor) -> bool:
    """Whether a kernel takes a chunk of one dtype to a gradient of the other."""
    is_narrowed = chunk.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    return chunk.dtype == out.dtype or is_narrowed


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0

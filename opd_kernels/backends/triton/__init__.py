"""The epilogues as Triton kernels, for chunks on a GPU; TRITON_INTERPRET=1 runs them on a CPU."""

import torch
import triton
from torch import Tensor

from opd_kernels.backends.devices import device_of
from opd_kernels.backends.epilogues import Epilogues, FusedEpilogues
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState, accumulator_dtype
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.configs import Case, RowConfig
from opd_kernels.backends.triton.divergence import FORWARD, JSD, REVERSE, divergence_kernel
from opd_kernels.backends.triton.launch import flags, head_operands
from opd_kernels.backends.triton.linear import TritonFusedEpilogues
from opd_kernels.backends.triton.reverse_kl import reverse_kl_kernel
from opd_kernels.backends.triton.rows import gradient_kernel, update_kernel


class TritonEpilogues(Epilogues):
    """Epilogues that Triton's kernels compute."""

    max_selected, max_given = configs.MAX_SELECTED, configs.MAX_GIVEN

    # filtered_gradient is PyTorch's: the number of entries that are kept depends on the data.

    def update(self, chunk: Chunk, state: RowState) -> None:
        (rows, columns), k = chunk.raw.shape, state.values.shape[1]
        if not self.covers(chunk, k, state.selects):
            return super().update(chunk, state)
        if rows == 0:
            return
        config = _config("update", k, chunk).fitted(columns, state.values.dtype)
        with device_of(chunk.raw):
            update_kernel[(rows,)](
                chunk.raw, chunk.raw.stride(0), columns, chunk.first_id, *_operands(chunk),
                state.values, state.ids, k, state.max, state.sum,
                state.max if state.moment is None else state.moment,
                SELECTS=state.selects, HAS_MOMENT=state.moment is not None, **flags(chunk.head),
                K=triton.next_power_of_2(k), BLOCK=config.block, **config.options(),
            )  # fmt: skip

    def gradient(self, chunk: Chunk, gradient: RowGradient, out: Tensor) -> None:
        (rows, columns), k = chunk.raw.shape, gradient.ids.shape[1]
        if not self.covers(chunk, k):
            return super().gradient(chunk, gradient, out)
        if rows == 0:
            return
        ids, dvalues, tail, dtail = gradient.contiguous()
        config = _config("gradient", k, chunk).fitted(columns, dvalues.dtype)
        span = config.block * configs.GRADIENT_BLOCKS
        with device_of(chunk.raw):
            gradient_kernel[(rows, triton.cdiv(columns, span))](
                chunk.raw, chunk.raw.stride(0), columns, chunk.first_id, *_operands(chunk),
                ids, dvalues, k, tail, dtail, out, out.stride(0), **flags(chunk.head),
                K=triton.next_power_of_2(k), BLOCK=config.block, SPAN=span, **config.options(),
            )  # fmt: skip

    def divergence(
        self, chunk: Chunk, teacher: Chunk, beta: float, upstream: Tensor | None, out: Tensor
    ) -> Tensor:
        if not (self.covers(chunk, 0) and self.covers(teacher, 0)):
            return super().divergence(chunk, teacher, beta, upstream, out)
        rows, columns = chunk.raw.shape
        dtype = accumulator_dtype(chunk.raw)
        losses = chunk.raw.new_empty(rows, dtype=dtype)
        if rows == 0:
            return losses
        config = _config("divergence", 0, chunk).fitted(columns, dtype)
        with device_of(chunk.raw):
            divergence_kernel[(rows,)](
                chunk.raw, chunk.raw.stride(0), *_operands(chunk),
                teacher.raw, teacher.raw.stride(0), *_operands(teacher),
                columns, beta, losses if upstream is None else upstream.contiguous(), losses,
                out, out.stride(0),
                KIND={0.0: FORWARD, 1.0: REVERSE}.get(beta, JSD).value,
                HAS_GRADIENT=upstream is not None, **flags(chunk.head),
                **{f"TEACHER_{name}": flag for name, flag in flags(teacher.head).items()},
                BLOCK=config.block, **config.options(),
            )  # fmt: skip
        return losses

    def reverse_kl(
        self,
        values: Tensor,
        tail: Tensor,
        teacher_values: Tensor,
        teacher_tail: Tensor,
        *,
        stop_gradient: bool,
        bucket: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, k = values.shape
        tensors = (values, tail, teacher_values, teacher_tail)
        if rows == 0 or k > configs.MAX_GIVEN or values.dtype != teacher_values.dtype:
            return super().reverse_kl(*tensors, stop_gradient=stop_gradient, bucket=bucket)
        losses, dvalues, dtail = (torch.empty_like(t, memory_format=torch.contiguous_format)
                                  for t in (tail, values, tail))  # fmt: skip
        slots = triton.next_power_of_2(k)
        config = configs.row_config(Case("reverse_kl", k, plain=True), values.device)
        block = max(1, config.block // slots)
        with device_of(values):
            reverse_kl_kernel[(triton.cdiv(rows, block),)](
                *(t.contiguous() for t in tensors), losses, dvalues, dtail, rows, k,
                STOP_GRADIENT=stop_gradient, BUCKET=bucket, ROWS=block, K=slots,
                **config.options(),
            )  # fmt: skip
        return losses, dvalues, dtail

    def fused(self, operand: torch.dtype, head: Head, k: int) -> FusedEpilogues | None:
        """The kernels of linear.py, for a product of few terms in 16 bits and few slots."""
        is_16_bit = operand.itemsize == 2 and operand == head.weight.dtype
        is_small = head.weight.shape[1] <= configs.MAX_FUSED_DIM and k <= configs.MAX_FUSED
        return _FUSED if is_16_bit and is_small and head.weight.stride(1) == 1 else None


_FUSED = TritonFusedEpilogues()


def _operands(chunk: Chunk) -> tuple[Tensor, float, float]:
    return head_operands(chunk.head, chunk.first_id, chunk.raw.shape[1], chunk.raw)


def _config(kernel: str, k: int, chunk: Chunk) -> RowConfig:
    return configs.row_config(Case(kernel, k, chunk.head.is_plain), chunk.raw.device)

"""Sums of the three gradients of a head over the chunks of the token walk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Head, Operands, accumulator_dtype
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.linear import products
from opd_kernels.linear.operators import FlatLogits
from opd_kernels.linear.pages import PagedTensor
from opd_kernels.linear.sparse import add_sparse_gradients
from opd_kernels.sparse_logits import SparseLogits


@dataclass
class GradientSums:
    """Accumulators for the gradients that are needed, in float32 (float64)."""

    dhidden: Tensor | None  # [N, D]
    dweight: PagedTensor | None  # [V_padded, D]
    dbias: Tensor | None  # [V_padded]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of the operands
    # Nothing was added to dweight yet. It then holds zeros on a CPU, but is uninitialised on a GPU.
    dweight_is_fresh: bool = True
    loss_scale: Tensor | None = None  # power of two that divides the sums; float16 chunks only

    @classmethod
    def zeros(
        cls, student: FlatLogits, needs: tuple[bool, bool, bool], chunks: int
    ) -> "GradientSums":
        """Sums of `chunks` chunks.

        With one chunk the product for dweight is not a sum, so it is written in bfloat16 where the
        operands are bfloat16. float16 has too small a range for that.
        """
        hidden, weight, bias = student.hidden, student.head.weight, student.head.bias
        dtype = accumulator_dtype(hidden, weight)
        operand = products.operand_dtype(hidden, weight)
        dweight_dtype = operand if chunks == 1 and operand == torch.bfloat16 else dtype
        dweight = None
        if needs[1] and weight.device.type != "cpu":
            dweight = PagedTensor(torch.empty_like(weight, dtype=dweight_dtype))
        elif needs[1]:
            dweight = PagedTensor.zeros_like(weight, dweight_dtype)
        return cls(
            torch.zeros_like(hidden, dtype=dtype) if needs[0] else None,
            dweight,
            torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None,
            (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype),
        )

    def add_dense(self, rows: slice, dlogits: Tensor, hidden: Tensor, head: Head) -> None:
        """Add the two matrix products of a gradient chunk [c, V]."""
        vocab = head.vocab_size
        if self.dhidden is not None:
            products.add_hidden_gradient_(self.dhidden[rows], dlogits, head.weight[:vocab])
        if self.dweight is not None:
            dweight, fresh = self.dweight.tensor, self.dweight_is_fresh
            products.add_weight_gradient_(dweight[:vocab], dlogits, hidden, overwrite=fresh)
            if fresh:
                dweight[vocab:] = 0.0
            self.dweight_is_fresh = False
        if self.dbias is not None:
            self.dbias[:vocab] += dlogits.sum(0, dtype=self.dbias.dtype)

    def add_entries(self, rows: slice, entries: SparseRows, hidden: Tensor, head: Head) -> None:
        """Add the products of a gradient chunk that was filtered."""
        if self.dhidden is not None:
            entries.add_to_hidden_(self.dhidden[rows], head.weight[: head.vocab_size])
        if self.dweight is not None:
            if self.dweight_is_fresh and self.dweight.tensor.device.type == "cpu":
                # Touches the pages in order; in the order of the entries that is slower.
                self.dweight.tensor.zero_()
            self._begin_sum()
            entries.add_to_weight_(self.dweight.tensor, hidden)
        if self.dbias is not None:
            entries.add_to_bias_(self.dbias)

    def add_sparse(
        self,
        rows: slice,
        hidden: Tensor,
        head: Head,
        student: SparseLogits,
        dvalues: Tensor,
        epilogues: Epilogues,
    ) -> None:
        """Add the gradient of a loss that never used the tail: no pass over the vocabulary."""
        self._begin_sum()
        dhidden = None if self.dhidden is None else self.dhidden[rows]
        dweight = None if self.dweight is None else self.dweight.tensor
        operands = Operands(hidden.to(student.values.dtype), head)  # for logits computed again
        sums = (dhidden, dweight, self.dbias)
        add_sparse_gradients(operands, student.ids, student.values, dvalues, sums, epilogues)

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients times a scalar, each in its operand's dtype; consumes the sums."""
        self._begin_sum()  # in case no chunk was added
        if self.loss_scale is not None:
            factor = self.loss_scale if factor is None else factor * self.loss_scale
        return (
            _scaled(self.dhidden, factor, self.dtypes[0]),
            _scaled(self.dweight, factor, self.dtypes[1]),
            _scaled(self.dbias, factor, self.dtypes[2]),
        )

    def _begin_sum(self) -> None:
        """Prepare dweight for sums that come row by row; bfloat16 would round at every addition."""
        if self.dweight is not None and self.dweight_is_fresh:
            dweight = self.dweight.tensor
            if dweight.dtype == torch.bfloat16:
                self.dweight = PagedTensor.zeros_like(dweight, torch.float32)
            elif dweight.device.type != "cpu":
                dweight.zero_()
        self.dweight_is_fresh = False


def _scaled(
    total: Tensor | PagedTensor | None, factor: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """total * factor, rounded to dtype; total is consumed."""
    if total is None:
        return None
    paged = total if isinstance(total, PagedTensor) else PagedTensor(total)
    tensor = paged.tensor
    if factor is None:
        return paged.rounded(dtype)
    if tensor.device.type == "cpu":  # a product with out= would keep a third tensor there
        tensor.mul_(factor)
        return paged.rounded(dtype)
    out = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    return torch.mul(tensor, factor, out=out)

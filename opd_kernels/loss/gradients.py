"""Sums of the three gradients of a head over the chunks of a walk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues
from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.backends.sparse_rows import SparseRows
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.linear import products
from opd_kernels.linear.pages import PagedTensor
from opd_kernels.linear.sparse import sparse_gradients
from opd_kernels.sparse_logits import SparseLogits


@dataclass
class Gradients:
    """Accumulators for the gradients that are needed, in float32 (float64)."""

    dhidden: Tensor | None  # [N, D]
    dweight: PagedTensor | None  # [V_padded, D]
    dbias: Tensor | None  # [V_padded]
    dweight_is_fresh: bool = True  # nothing was added: zeros on a CPU, on a GPU uninitialised
    unit: Tensor | None = None  # of all three, where they are sums of float16 chunks

    @classmethod
    def zeros(cls, student: LazyLogits, needs: tuple[bool, bool, bool], chunks: int) -> "Gradients":
        """For so many chunks to add. The product of a single one is not a sum, so where products
        take bfloat16 it is rounded to it at once; float16 has not the range.
        """
        dtype = accumulator_dtype(student.hidden, student.weight)
        operand = products.operand_dtype(student.hidden, student.weight)
        whole = operand if chunks == 1 and operand == torch.bfloat16 else dtype
        hidden, weight, bias = student.hidden, student.weight, student.bias
        dhidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        dweight = None
        if needs[1] and weight.device.type != "cpu":
            dweight = PagedTensor(torch.empty_like(weight, dtype=whole))
        elif needs[1]:
            dweight = PagedTensor.zeros_like(weight, whole)
        dbias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
        return cls(dhidden, dweight, dbias)

    def add_dense(self, rows: slice, dlogits: Tensor, hidden: Tensor, head: Head) -> None:
        """Add the two matrix products of a gradient chunk [c, V]."""
        vocab = head.vocab_size
        if self.dhidden is not None:
            products.add_hidden_gradient_(self.dhidden[rows], dlogits, head.rows(0, vocab))
        if self.dweight is not None:
            dweight, fresh = self.dweight.tensor, self.dweight_is_fresh
            products.add_weight_gradient_(dweight[:vocab], dlogits, hidden, fresh)
            if fresh:
                dweight[vocab:] = 0.0
            self.dweight_is_fresh = False
        if self.dbias is not None:
            self.dbias[:vocab] += dlogits.sum(0, dtype=self.dbias.dtype)

    def add_entries(self, rows: slice, entries: SparseRows, hidden: Tensor, head: Head) -> None:
        """Add the products of a gradient chunk of which few entries are kept."""
        if self.dhidden is not None:
            entries.add_to_hidden_(self.dhidden[rows], head.rows(0, head.vocab_size))
        if self.dweight is not None:
            if self.dweight_is_fresh and self.dweight.tensor.device.type == "cpu":
                self.dweight.tensor.zero_()  # faults its pages in in order, not as rows come
            self._begin_sum()
            entries.add_to_weight_(self.dweight.tensor, hidden)
        if self.dbias is not None:
            entries.add_to_bias_(self.dbias)

    def add_sparse(
        self,
        rows: slice,
        hidden: Tensor,
        head: Head,
        leaf: SparseLogits,
        dvalues: Tensor,
        epilogues: Epilogues,
    ) -> None:
        """Add the gradient of a loss that never used the tail: no pass over the vocabulary."""
        self._begin_sum()
        dhidden = None if self.dhidden is None else self.dhidden[rows]
        dweight = None if self.dweight is None else self.dweight.tensor
        hidden = hidden.to(leaf.values.dtype)  # for the logits that it computes again
        sparse_gradients(
            hidden, head, leaf.ids, leaf.values, dvalues, dhidden, dweight, self.dbias, epilogues
        )

    def scaled(self, factor: Tensor | None, student: LazyLogits) -> tuple[Tensor | None, ...]:
        """The gradients times a scalar, each in its operand's dtype; consumes the sums."""
        self._begin_sum()  # where no chunk was added
        if self.unit is not None:
            factor = self.unit if factor is None else factor * self.unit
        results: list[Tensor | None] = []
        for total, operand in (
            (self.dhidden, student.hidden),
            (self.dweight, student.weight),
            (self.dbias, student.bias),
        ):
            if total is None or operand is None:
                results.append(None)
                continue
            paged = total if isinstance(total, PagedTensor) else PagedTensor(total)
            results.append(_in_dtype(paged, factor, operand.dtype))
        return tuple(results)

    def _begin_sum(self) -> None:
        """Before anything is added row by row, which in 16 bits would round at every addition."""
        if self.dweight is not None and self.dweight_is_fresh:
            dweight = self.dweight.tensor
            if dweight.dtype == torch.bfloat16:
                self.dweight = PagedTensor.zeros_like(dweight, torch.float32)
            elif dweight.device.type != "cpu":
                dweight.zero_()
        self.dweight_is_fresh = False


def _in_dtype(total: PagedTensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """total * factor, rounded to dtype; total is used up."""
    if factor is None:
        return total.rounded(dtype)
    tensor = total.tensor
    if tensor.device.type == "cpu":  # which would keep the product in a third tensor to round it
        tensor.mul_(factor)
        return total.rounded(dtype)
    out = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    return torch.mul(tensor, factor, out=out)

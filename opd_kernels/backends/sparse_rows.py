"""SparseRows: a gradient of logits that is zero nearly everywhere, and its matrix products."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix [n, V] as its stored entries, sorted by row."""

    rows: Tensor  # [E] int64, ascending
    columns: Tensor  # [E] int64
    values: Tensor  # [E]

    @classmethod
    def of_support(cls, ids: Tensor, values: Tensor) -> "SparseRows":
        """Take values [n, K] at ids [n, K]; a slot with a negative id is empty."""
        rows, slots = (ids >= 0).nonzero(as_tuple=True)
        return cls(rows, ids[rows, slots], values[rows, slots])

    def add_to_hidden_(self, dhidden: Tensor, weight: Tensor) -> None:
        """dhidden [n, D] += self @ weight [V, D]."""
        _accumulate_(dhidden, self.rows, self.columns, self.values, weight)

    def add_to_weight_(self, dweight: Tensor, hidden: Tensor) -> None:
        """dweight [V, D] += self.T @ hidden [n, D]."""
        # The stable sort adds to every row of dweight in the order of the tokens.
        columns, order = self.columns.sort(stable=True)
        _accumulate_(dweight, columns, self.rows[order], self.values[order], hidden)

    def add_to_bias_(self, dbias: Tensor) -> None:
        """dbias [V] += self.sum(0)."""
        _add_rows_(dbias[:, None], self.columns, self.values[:, None])


def _accumulate_(out: Tensor, rows: Tensor, columns: Tensor, values: Tensor, dense: Tensor) -> None:
    """out[rows[i]] += values[i] * dense[columns[i]], rows ascending; two runs are bitwise equal."""
    if values.numel() == 0:
        return
    has_product = out.device.type == "cpu" and torch.backends.mkl.is_available()
    # MKL's product passes over all of out, so it pays if most rows of out are written.
    if has_product and dense.dtype == out.dtype and out.shape[0] <= 4 * values.shape[0]:
        torch.addmm(
            out, _csr(rows, columns, values, (out.shape[0], dense.shape[0])), dense, out=out
        )
        return
    for block in _blocks(values, dense.shape[1]):
        # The product gets no name: it would keep it in memory while the next one is allocated.
        _add_rows_(out, rows[block], dense[columns[block]].to(out.dtype).mul_(values[block, None]))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    offsets = rows.new_zeros(shape[0] + 1)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=offsets[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


def _blocks(values: Tensor, width: int) -> Iterator[slice]:
    count = max(1, _BLOCK_BYTES // (width * values.element_size()))
    for first in range(0, values.shape[0], count):
        yield slice(first, first + count)


def _add_rows_(out: Tensor, ids: Tensor, rows: Tensor) -> None:
    """out[ids[i]] += rows[i], in a fixed order of summation."""
    if out.device.type == "cpu":
        out.index_add_(0, ids, rows)
    else:
        # On CUDA index_add_ uses atomics; an accumulating index_put_ sorts, so it is repeatable.
        out.index_put_((ids,), rows, accumulate=True)

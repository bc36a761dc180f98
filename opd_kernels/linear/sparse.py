"""The head at N * K entries only: for losses that need no pass over the vocabulary.

`gather(ids, tail=False)` computes N * K dot products. A loss that never used the tail has a
gradient on S only, so dhidden and dweight are gathers and scatters of N * K rows of the weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Head, Operands
from opd_kernels.backends.sparse_rows import SparseRows

_BLOCK_BYTES = 16 << 20


def gather_logits(operands: Operands, ids: Tensor) -> Tensor:
    """Final logits at canonical ids [N, K], -inf in empty slots; in the dtype of hidden."""
    return operands.head.logits(_scores(operands, ids)).masked_fill_(ids < 0, -torch.inf)


def add_sparse_gradients(
    operands: Operands,
    ids: Tensor,
    values: Tensor,
    dvalues: Tensor,
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
    epilogues: Epilogues,
) -> None:
    """Add the gradient through the logits `values` [N, K] at ids [N, K] to the sums.

    Args:
        operands: with hidden states in the dtype of values.
        sums: dhidden [N, D], dweight [V, D] and dbias [V], each None if it is not needed.
    """
    head, (dhidden, dweight, dbias) = operands.head, sums
    derivative = head.derivative(values if head.softcap is None else _scores(operands, ids))
    live = ids.masked_fill(values == -torch.inf, -1)
    coefficients = dvalues * derivative
    if dbias is not None:
        SparseRows.of_support(live, coefficients).add_to_bias_(dbias)
    epilogues.sparse_backward(live, coefficients, operands.hidden, head.weight, dhidden, dweight)


def _scores(operands: Operands, ids: Tensor) -> Tensor:
    """hidden @ weight.T + bias at ids [N, K]; an empty slot gets the score of id 0."""
    hidden, head = operands.hidden, operands.head
    scores = hidden.new_empty(ids.shape)
    for rows in _row_blocks(ids, hidden):
        # The gathered rows get no name: it would keep them in memory while the next are allocated.
        scores[rows] = torch.bmm(_weight_rows(head, ids[rows], hidden), hidden[rows, :, None])[
            ..., 0
        ]
    if head.bias is not None:
        scores += head.bias.to(hidden.dtype)[ids.clamp_min(0)]
    return scores


def _weight_rows(head: Head, ids: Tensor, hidden: Tensor) -> Tensor:
    return head.weight[ids.clamp_min(0)].to(hidden.dtype)


def _row_blocks(ids: Tensor, hidden: Tensor) -> Iterator[slice]:
    bytes_per_row = max(1, ids.shape[1] * hidden.shape[1] * hidden.element_size())
    rows = max(1, _BLOCK_BYTES // bytes_per_row)
    for first in range(0, ids.shape[0], rows):
        yield slice(first, min(first + rows, ids.shape[0]))

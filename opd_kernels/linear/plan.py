"""How much of the logits lives at a time, and which order is cheaper so.

In the one-pass order every token chunk reads and writes the whole [V, D] gradient of the weight, so
a chunk is as large as the budget allows; where that is too small, recomputing the logits is cheaper
by the cost model. In the recompute order a chunk is to stay in the cache between the kernels that
use it, but every vocabulary chunk reads and writes the [N, D] gradient of the hidden states, so it
holds MIN_COLUMNS at least. The measurements are in docs/log.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from opd_kernels.linear import pages
from opd_kernels.linear.cost_model import (
    Kernel,
    Machine,
    Shape,
    one_pass,
    pieces,
    recompute,
    reduction,
    seconds,
)

MIN_COLUMNS = 4096
# Rows of a chunk that start at a multiple of a vector's size multiply up to a quarter faster.
_ALIGNMENT = 64
_MIB = 1 << 20
_LEAST_CHUNK = 24 * _MIB
# Bytes of logits that may live at a time, unless the user sets chunk_bytes.
_CPU_BUDGET, _GPU_BUDGET = 192 * _MIB, 1536 * _MIB


def _even_size(total: int, most: int) -> int:
    """The size of equal pieces of `total`, none over `most`."""
    pieces = -(-total // max(1, most))
    return -(-total // max(1, pieces))


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def budget_of(device: torch.device, chunk_bytes: int | None) -> int:
    """Bytes of logits that may live at a time: the user's, or the device's default."""
    if chunk_bytes is None:
        return _CPU_BUDGET if device.type == "cpu" else _GPU_BUDGET
    return chunk_bytes


def recompute_sizes(
    tokens: int, vocab: int, bytes_a_logit: int, device: torch.device, chunk_bytes: int | None
) -> tuple[int, int]:
    """Rows and columns of a logits chunk in the recompute order."""
    near = _near(Machine.for_device(device, 2), budget_of(device, chunk_bytes))
    return _recompute_sizes(tokens, vocab, near // bytes_a_logit)


def _near(machine: Machine, budget: int) -> int:
    """Bytes of a recompute chunk: within the cache, but enough rows to pay for dweight's sum."""
    return min(budget, max(machine.cache, _LEAST_CHUNK))


def _recompute_sizes(tokens: int, vocab: int, budget: int) -> tuple[int, int]:
    """Within a budget of so many logits."""
    most = max(MIN_COLUMNS, budget // max(tokens, 1) // _ALIGNMENT * _ALIGNMENT)
    columns = min(vocab, _aligned(_even_size(vocab, most)))
    rows = _even_size(tokens, max(1, budget // columns))
    return rows, columns


def chunk_buffer(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits [rows, columns] whose rows start at multiples of _ALIGNMENT."""
    return pages.empty((rows, _aligned(columns)), like, dtype)[:, :columns]


def one_pass_rows(
    tokens: int, vocab: int, bytes_a_logit: int, device: torch.device, chunk_bytes: int | None
) -> int:
    """Rows of a logits chunk in the one-pass order: as many as the budget holds, or one."""
    return rows_within(tokens, vocab, budget_of(device, chunk_bytes) // bytes_a_logit)


def rows_within(tokens: int, vocab: int, budget: int) -> int:
    """Rows of a one-pass chunk within a budget of so many logits."""
    return _even_size(tokens, budget // _aligned(vocab))


def prefers_one_pass(
    shape: Shape, device: torch.device, chunk_bytes: int | None, fused: bool
) -> bool:
    """Whether one_pass, in the chunks that the budget holds, costs no more than recompute."""
    if shape.tokens == 0:
        return True
    machine = Machine.for_device(device, shape.operand_bytes)
    # The number of tokens may be another in every step, and to count kernels takes milliseconds.
    rounding = 1 << max(0, shape.tokens.bit_length() - 4)
    rounded = replace(shape, tokens=-(-shape.tokens // rounding) * rounding)
    return cheaper_order(rounded, machine, budget_of(device, chunk_bytes), fused) == "one_pass"


@cache
def cheaper_order(shape: Shape, machine: Machine, budget: int, fused: bool) -> str:
    """The order in which the student's kernels take less, by the cost model."""
    orders = orders_of(shape, machine, budget, fused)
    return min(orders, key=lambda order: seconds(orders[order], machine))


def recompute_chunks(
    shape: Shape, machine: Machine, budget: int, fused: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a chunk of the recompute order's forward and of its backward pass."""
    near = _near(machine, budget)
    bytes_a_logit = shape.operand_bytes if fused else shape.bytes_per_logit
    extent = (shape.tokens, shape.vocab)
    return (
        _recompute_sizes(*extent, near // shape.logit_bytes),
        _recompute_sizes(*extent, near // bytes_a_logit),
    )


def orders_of(
    shape: Shape, machine: Machine, budget: int, fused: bool, teacher: Shape | None = None
) -> dict[str, Iterator[Kernel]]:
    """The kernels of student and teacher in both orders, in the chunks that a budget of bytes
    holds; a teacher that gathers at the student's ids, or none.
    """
    rows = rows_within(shape.tokens, shape.vocab, budget // shape.bytes_per_logit)
    forward, backward = recompute_chunks(shape, machine, budget, fused)
    orders = {
        "one_pass": one_pass(shape, rows, machine),
        "recompute": recompute(shape, forward, backward, machine, fused),
    }
    if teacher is not None:
        for order, most in (("one_pass", rows), ("recompute", shape.tokens)):
            for tokens in pieces(shape.tokens, most):
                part = replace(teacher, tokens=tokens)
                sizes, _ = recompute_chunks(part, machine, budget, fused)
                gathered = reduction(part, *sizes, machine, selects=False, fused=fused)
                orders[order] = chain(orders[order], gathered)
    return orders

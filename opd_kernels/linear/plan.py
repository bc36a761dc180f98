"""The sizes of chunks of logits within a memory budget, and the order that is cheaper with them.

In the one_pass order every token chunk reads and writes the whole [V, D] gradient of the weight, so
a chunk is as large as the budget allows. Where that is too small, recomputing the logits is cheaper
by the cost model. In the recompute order a chunk should stay in the cache between the kernels that
use it. Every vocabulary chunk reads and writes the [N, D] gradient of the hidden states, so a chunk
has at least MIN_COLUMNS columns. The measurements are in docs/log.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from itertools import chain

import torch

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
from opd_kernels.linear.pages import ALIGNMENT, aligned

MIN_COLUMNS = 4096
_MIB = 1 << 20
_LEAST_CHUNK = 24 * _MIB
# The most bytes of logits at a time, unless the user sets chunk_bytes.
_CPU_BUDGET, _GPU_BUDGET = 192 * _MIB, 1536 * _MIB


def _even_size(total: int, most: int) -> int:
    """The size of the pieces when `total` is divided evenly into pieces of at most `most`."""
    pieces = -(-total // max(1, most))
    return -(-total // max(1, pieces))


def budget_of(device: torch.device, chunk_bytes: int | None) -> int:
    """The most bytes of logits at a time: chunk_bytes, or the device's default."""
    if chunk_bytes is None:
        return _CPU_BUDGET if device.type == "cpu" else _GPU_BUDGET
    return chunk_bytes


def recompute_sizes(
    tokens: int, vocab: int, bytes_per_logit: int, device: torch.device, chunk_bytes: int | None
) -> tuple[int, int]:
    """Rows and columns of a logits chunk in the recompute order."""
    near = _near(Machine.for_device(device, 2), budget_of(device, chunk_bytes))
    return _recompute_sizes(tokens, vocab, near // bytes_per_logit)


def _near(machine: Machine, budget: int) -> int:
    """Bytes of a recompute chunk: it fits the cache, but has enough rows to pay for dweight."""
    return min(budget, max(machine.cache, _LEAST_CHUNK))


def _recompute_sizes(tokens: int, vocab: int, budget: int) -> tuple[int, int]:
    """Rows and columns of a recompute chunk of at most `budget` logits."""
    most = max(MIN_COLUMNS, budget // max(tokens, 1) // ALIGNMENT * ALIGNMENT)
    columns = min(vocab, aligned(_even_size(vocab, most)))
    rows = _even_size(tokens, max(1, budget // columns))
    return rows, columns


@lru_cache(maxsize=1024)
def one_pass_rows(
    tokens: int, vocab: int, bytes_per_logit: int, device: torch.device, chunk_bytes: int | None
) -> int:
    """Rows of a logits chunk in the one_pass order: as many as the budget holds, at least one."""
    return rows_within(tokens, vocab, budget_of(device, chunk_bytes) // bytes_per_logit)


def rows_within(tokens: int, vocab: int, budget: int) -> int:
    """Rows of a one_pass chunk of at most `budget` logits."""
    return _even_size(tokens, budget // aligned(vocab))


@lru_cache(maxsize=1024)
def prefers_one_pass(
    shape: Shape, device: torch.device, chunk_bytes: int | None, fused: bool
) -> bool:
    """Whether one_pass, in the chunks that the budget holds, costs no more than recompute."""
    if shape.tokens == 0:
        return True
    machine = Machine.for_device(device, shape.operand_bytes)
    # Counting kernels takes milliseconds and the number of tokens changes from step to step, so
    # the result is cached for a rounded number of tokens.
    rounding = 1 << max(0, shape.tokens.bit_length() - 4)
    rounded = replace(shape, tokens=-(-shape.tokens // rounding) * rounding)
    return cheaper_order(rounded, machine, budget_of(device, chunk_bytes), fused) == "one_pass"


@cache
def cheaper_order(shape: Shape, machine: Machine, budget: int, fused: bool) -> str:
    """The order in which the student's kernels take less time by the cost model."""
    orders = orders_of(shape, machine, budget, fused)
    return min(orders, key=lambda order: seconds(orders[order], machine))


def recompute_chunks(
    shape: Shape, machine: Machine, budget: int, fused: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a recompute chunk, for the forward and for the backward pass."""
    near = _near(machine, budget)
    bytes_per_logit = shape.operand_bytes if fused else shape.bytes_per_logit
    extent = (shape.tokens, shape.vocab)
    return (
        _recompute_sizes(*extent, near // shape.logit_bytes),
        _recompute_sizes(*extent, near // bytes_per_logit),
    )


def orders_of(
    shape: Shape, machine: Machine, budget: int, fused: bool, teacher: Shape | None = None
) -> dict[str, Iterator[Kernel]]:
    """The kernels of student and teacher in both orders, in chunks of at most `budget` bytes.

    The teacher, if there is one, gathers at the student's ids.
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

"""update and gradient with the matrix product inside: only a tile of logits exists at a time, in
registers.

`update` supports given ids only. Each program processes a piece of the vocabulary for a block of
rows. The pieces are merged in a fixed order afterwards, so that two runs are bitwise equal. The
entries of S are sorted by column, so that a program finds those of each tile by advancing a cursor.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels.backends.devices import device_of
from opd_kernels.backends.records import Operands, RowGradient, RowState
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.configs import Case, TileConfig
from opd_kernels.backends.triton.elementwise import derivatives_of, logits_of
from opd_kernels.backends.triton.launch import flags, head_operands
from opd_kernels.backends.triton.online_sum import absorb

_NO_COLUMN = 2**31 - 1
_GRAIN = tl.constexpr(16)  # tiles start at multiples of this many columns


@dataclass(frozen=True)
class Support:
    """The entries of S of each block of rows, sorted by column and followed by a sentinel."""

    columns: Tensor  # [blocks, T] int32
    places: Tensor  # [blocks, T] int32: row in the block * K + slot
    starts: Tensor  # [blocks, V / 16] int32: the first entry from each 16th column on
    k: int

    @classmethod
    def from_ids(cls, ids: Tensor, block: int, vocab: int) -> "Support":
        """Sort canonical ids [n, K] for blocks of `block` rows."""
        rows, k = ids.shape
        blocks = triton.cdiv(rows, block)
        columns = ids.new_full((blocks * block * k + blocks,), _NO_COLUMN, dtype=torch.int32)
        columns = columns.view(blocks, block * k + 1)
        live = ids.masked_fill(ids < 0, _NO_COLUMN).to(torch.int32).reshape(-1)
        padded = live.new_full((blocks * block * k,), _NO_COLUMN)
        padded[: live.numel()] = live
        columns[:, :-1] = padded.view(blocks, block * k)
        columns, places = columns.sort(dim=1, stable=True)
        grains = torch.arange(0, vocab, _GRAIN.value, dtype=torch.int32, device=ids.device)
        starts = torch.searchsorted(columns, grains.expand(blocks, -1).contiguous())
        return cls(columns, places.to(torch.int32), starts.to(torch.int32), k)


@triton.jit
def _scores(
    hidden,  # [n, D]
    hidden_stride,
    row,  # [ROWS]
    live_rows,
    weight,  # [v, D]
    weight_stride,
    column,  # [COLUMNS]
    live_columns,
    depth,  # D
    bias,  # [v]
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile [ROWS, COLUMNS] of hidden @ weight.T + bias in float32."""
    inner = tl.arange(0, DEPTH)
    a = hidden + row.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    b = weight + column.to(tl.int64)[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        rest = depth - first
        x = tl.load(a + first, mask=live_rows[:, None] & (inner[None, :] < rest), other=0.0)
        y = tl.load(b + first, mask=live_columns[None, :] & (inner[:, None] < rest), other=0.0)
        if UPCAST:  # the interpreter's tl.dot would multiply the raw bits of bfloat16
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=live_columns, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def linear_update_kernel(
    hidden,  # [n, D]
    hidden_stride,
    weight,  # [V, D]
    weight_stride,
    rows,  # n
    depth,  # D
    vocab,  # V
    bias,  # [V]
    inner: tl.float64,
    outer: tl.float64,
    target_columns,  # [blocks, T]
    target_places,  # [blocks, T]
    targets,  # T
    starts,  # [blocks, grains]
    grains,
    tiles,  # number of tiles per piece
    values,  # [n, k]
    k,
    maxima,  # [pieces, n]
    sums,  # [pieces, n]
    moments,  # [pieces, n]
    HAS_MOMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner, outer = tl.full((), inner, tl.float32), tl.full((), outer, tl.float32)
    local = tl.arange(0, ROWS)
    row = block * ROWS + local
    live_rows = row < rows
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    first_grain = piece * tiles * COLUMNS // _GRAIN
    target = block * targets + tl.load(starts + block * grains + first_grain)
    target_column = tl.load(target_columns + target)
    last = tl.minimum((piece + 1) * tiles * COLUMNS, vocab)
    for first in range(piece * tiles * COLUMNS, last, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        live = column < vocab
        scores = _scores(
            hidden, hidden_stride, row, live_rows, weight, weight_stride, column, live, depth,
            bias, HAS_BIAS, ROWS, COLUMNS, DEPTH, UPCAST,
        )  # fmt: skip
        z = logits_of(scores, inner, outer, CAPPED)
        z = tl.where(live[None, :], z, float("-inf"))
        while target_column < first + COLUMNS:
            place = tl.load(target_places + target)
            here = (local[:, None] == place // k) & (column[None, :] == target_column)
            value = tl.sum(tl.sum(tl.where(here, z, 0.0), axis=1), axis=0)
            tl.store(values + block * ROWS * k + place, value)
            z = tl.where(here, float("-inf"), z)
            target += 1
            target_column = tl.load(target_columns + target)
        block_peak = tl.max(z, axis=1)
        peak, total, moment = absorb(z, block_peak, peak, total, moment, HAS_MOMENT, 1)
    offset = piece * rows + row
    tl.store(maxima + offset, peak, mask=live_rows)
    tl.store(sums + offset, total, mask=live_rows)
    if HAS_MOMENT:
        tl.store(moments + offset, moment, mask=live_rows)


@triton.jit
def linear_gradient_kernel(
    hidden,  # [n, D]
    hidden_stride,
    weight,  # [v, D]
    weight_stride,
    rows,  # n
    depth,  # D
    columns,  # v
    first_id,
    bias,  # [v]
    inner: tl.float64,
    outer: tl.float64,
    target_columns,  # [blocks, T]
    target_places,  # [blocks, T]
    targets,  # T
    starts,  # [blocks, grains]
    grains,
    dvalues,  # [n, k]
    k,
    tails,  # [n]
    dtails,  # [n]
    out,  # [n, v]
    out_stride,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner, outer = tl.full((), inner, tl.float32), tl.full((), outer, tl.float32)
    local = tl.arange(0, ROWS)
    row = block * ROWS + local
    live_rows = row < rows
    first = tile * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    live = column < columns
    scores = _scores(
        hidden, hidden_stride, row, live_rows, weight, weight_stride, column, live, depth,
        bias, HAS_BIAS, ROWS, COLUMNS, DEPTH, UPCAST,
    )  # fmt: skip
    tail = tl.load(tails + row, mask=live_rows, other=0.0)
    dtail = tl.load(dtails + row, mask=live_rows, other=0.0)
    # A row with tail -inf has no mass off S. Subtracting +inf gives exp(-inf) = 0 there, while
    # -inf - -inf would be NaN.
    shift = tl.where(tail == float("-inf"), float("inf"), tail)
    dlogits = tl.exp(logits_of(scores, inner, outer, CAPPED) - shift[:, None]) * dtail[:, None]
    first_grain = (first_id + first) // _GRAIN
    target = block * targets + tl.load(starts + block * grains + first_grain)
    target_column = tl.load(target_columns + target)
    while target_column < first_id + first + COLUMNS:
        place = tl.load(target_places + target)
        dvalue = tl.load(dvalues + block * ROWS * k + place)
        here = (local[:, None] == place // k) & (column[None, :] == target_column - first_id)
        dlogits = tl.where(here, dvalue, dlogits)
        target += 1
        target_column = tl.load(target_columns + target)
    dscores = dlogits * derivatives_of(scores, inner, outer, CAPPED)
    pointers = out + row[:, None] * out_stride + column[None, :]
    tl.store(pointers, dscores.to(out.dtype.element_ty), mask=live_rows[:, None] & live[None, :])


class TritonFusedEpilogues:
    """See FusedEpilogues. hidden and the weight share a 16-bit dtype, or are float32.

    float32 operands are multiplied exactly, not in TF32.
    """

    def update(self, operands: Operands, state: RowState) -> None:
        hidden, head = operands.hidden, operands.head
        (rows, depth), k = hidden.shape, state.ids.shape[1]
        config = _config("linear_update", k, operands)
        blocks = triton.cdiv(rows, config.rows)
        tiles = triton.cdiv(head.vocab_size, config.columns)
        # At least two programs for every multiprocessor, so that few rows fill the machine too.
        pieces = min(tiles, triton.cdiv(2 * configs.multiprocessors(hidden.device), blocks))
        tiles_per_piece = triton.cdiv(tiles, pieces)
        pieces = triton.cdiv(tiles, tiles_per_piece)
        support = Support.from_ids(state.ids, config.rows, head.vocab_size)
        maxima = state.max.new_empty((pieces, rows))
        sums, moments = torch.empty_like(maxima), torch.empty_like(maxima)
        with device_of(hidden):
            linear_update_kernel[(blocks, pieces)](
                hidden, hidden.stride(0), head.weight, head.weight.stride(0), rows, depth,
                head.vocab_size, *head_operands(head, 0, head.vocab_size, hidden),
                support.columns, support.places, support.columns.shape[1],
                support.starts, support.starts.shape[1], tiles_per_piece,
                state.values, k, maxima, sums, moments,
                HAS_MOMENT=state.moment is not None, **flags(head), **config.options(),
            )  # fmt: skip
        _merge(maxima, sums, moments, state)

    def support(self, ids: Tensor, operands: Operands) -> Support:
        """Canonical ids [n, K] in the order in which `gradient` meets them."""
        rows = _config("linear_gradient", ids.shape[1], operands).rows
        return Support.from_ids(ids, rows, operands.head.vocab_size)

    def gradient(
        self,
        operands: Operands,
        first_id: int,
        support: Support,
        gradient: RowGradient,
        out: Tensor,
    ) -> None:
        hidden, head = operands.hidden, operands.head
        (tokens, depth), columns = hidden.shape, out.shape[1]
        weight = head.weight[first_id : first_id + columns]
        config = _config("linear_gradient", support.k, operands)
        blocks, tiles = triton.cdiv(tokens, config.rows), triton.cdiv(columns, config.columns)
        _, dvalues, tail, dtail = gradient.contiguous()
        with device_of(hidden):
            linear_gradient_kernel[(blocks, tiles)](
                hidden, hidden.stride(0), weight, weight.stride(0), tokens, depth, columns,
                first_id, *head_operands(head, first_id, columns, hidden),
                support.columns, support.places, support.columns.shape[1],
                support.starts, support.starts.shape[1],
                dvalues, support.k, tail, dtail, out, out.stride(0),
                **flags(head), **config.options(),
            )  # fmt: skip


def _merge(maxima: Tensor, sums: Tensor, moments: Tensor, state: RowState) -> None:
    """Write the running sums [pieces, N] of all pieces to the state."""
    peak = maxima.amax(0)
    gap = maxima - peak.masked_fill(peak == -torch.inf, 0.0)
    decay = gap.exp()
    state.max.copy_(peak)
    torch.sum(decay * sums, 0, out=state.sum)
    if state.moment is not None:
        moved = (sums * gap).masked_fill_(decay == 0, 0.0)
        torch.sum(decay * (moments + moved), 0, out=state.moment)


def _config(kernel: str, k: int, operands: Operands) -> TileConfig:
    hidden = operands.hidden
    case = Case(kernel, k, operands.head.is_plain, dim=hidden.shape[1])
    return configs.tile_config(case, hidden.device)

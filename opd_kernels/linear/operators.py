"""The two differentiable operators as PyTorch custom ops: schemas, fake kernels and autograd.

`linear_topk` selects the K largest logits of a row while it computes the logsumexp of the rest;
`linear_gather` takes the ids as given. Both return SparseLogits' three tensors, and both go
backward through `linear_backward`. Operands here are two-dimensional; LazyLogits is the door that
checks and reshapes.
"""

from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import RowState, select_backend
from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.linear.pages import PagedTensor
from opd_kernels.linear.products import operand_dtype
from opd_kernels.linear.sparse import canonical_ids, gather_logits, sparse_gradients
from opd_kernels.linear.vocabulary_walk import backpropagate, reduce_logits


@torch.library.custom_op("opd_kernels::linear_topk", mutates_args=())
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    softcap: float | None,
    scale: float,
    temperature: float,
    vocab_size: int,
    entropy: bool,
    chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [N, K], ids [N, K], tail [N] and entropy [N] (or [0]) of hidden [N, D]."""
    head = Head(weight, bias, softcap, scale, temperature, vocab_size)
    like = hidden.new_empty(0, dtype=accumulator_dtype(hidden, weight))
    state = RowState.for_topk(hidden.shape[0], k, entropy, like)
    with torch.autocast(hidden.device.type, enabled=False):
        epilogues = select_backend(backend, hidden.device)
        operand = hidden.to(operand_dtype(hidden, weight))
        reduce_logits(operand, head, state, epilogues, chunk_bytes)
    return state.values, state.ids, state.tail(), _entropy_or(like, state)


@torch.library.custom_op("opd_kernels::linear_gather", mutates_args=())
def linear_gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    vocab_size: int,
    tail: bool,
    entropy: bool,
    chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, K], tail [N] (or [0]) and entropy [N] (or [0]) of hidden [N, D] at ids [N, K]."""
    head = Head(weight, bias, softcap, scale, temperature, vocab_size)
    ids = canonical_ids(ids, vocab_size)
    like = hidden.new_empty(0, dtype=accumulator_dtype(hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        epilogues = select_backend(backend, hidden.device)
        if not tail:
            return gather_logits(hidden.to(like.dtype), head, ids), like, like.clone()
        state = RowState.for_ids(ids, entropy, like)
        operand = hidden.to(operand_dtype(hidden, weight))
        reduce_logits(operand, head, state, epilogues, chunk_bytes)
    return state.values, state.tail(), _entropy_or(like, state)


@torch.library.custom_op("opd_kernels::linear_backward", mutates_args=())
def linear_backward(
    dvalues: Tensor | None,
    dtail: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    tail: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    vocab_size: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [N, D], dweight [V, D] and dbias [V], each [0] where it is not needed.

    Without dtail there is no pass over the vocabulary. That is decided by the absence of the
    gradient, never by its values, so that no host synchronisation is needed.
    """
    head = Head(weight, bias, softcap, scale, temperature, vocab_size)
    ids = canonical_ids(ids, vocab_size)
    dhidden = torch.zeros_like(hidden, dtype=values.dtype) if needs_dhidden else None
    # A 16-bit sum over tokens would round at every addition.
    dweight_dtype = values.dtype if dtail is None else weight.dtype
    paged = PagedTensor.zeros_like(weight, dweight_dtype) if needs_dweight else None
    dweight = None if paged is None else paged.tensor
    dbias = torch.zeros_like(bias, dtype=values.dtype) if needs_dbias and bias is not None else None
    with torch.autocast(hidden.device.type, enabled=False):
        if dvalues is None:
            dvalues = torch.zeros_like(values)
        epilogues = select_backend(backend, hidden.device)
        if dtail is not None:
            backpropagate(
                hidden.to(operand_dtype(hidden, weight)),
                head,
                ids,
                dvalues,
                tail,
                dtail,
                dhidden,
                dweight,
                dbias,
                epilogues,
                chunk_bytes,
            )
        else:
            sums = (dhidden, dweight, dbias)
            operand = hidden.to(values.dtype)
            sparse_gradients(operand, head, ids, values, dvalues, *sums, epilogues)
    nothing = hidden.new_empty(0)
    return (
        nothing if dhidden is None else dhidden.to(hidden.dtype),
        nothing.clone() if paged is None else paged.rounded(weight.dtype),
        nothing.clone() if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _entropy_or(nothing: Tensor, state: RowState) -> Tensor:
    return nothing if state.moment is None else state.entropy()


@linear_topk.register_fake
def _fake_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, entropy, _, _ = options
    tokens, dtype = hidden.shape[0], accumulator_dtype(hidden, weight)
    values = hidden.new_empty((tokens, k), dtype=dtype)
    ids = hidden.new_empty((tokens, k), dtype=torch.int64)
    rows = hidden.new_empty(tokens, dtype=dtype)
    return values, ids, rows, hidden.new_empty(tokens if entropy else 0, dtype=dtype)


@linear_gather.register_fake
def _fake_gather(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, tail, entropy, _, _ = options
    tokens, dtype = hidden.shape[0], accumulator_dtype(hidden, weight)
    values = hidden.new_empty(ids.shape, dtype=dtype)
    rows = hidden.new_empty(tokens if tail else 0, dtype=dtype)
    return values, rows, hidden.new_empty(tokens if tail and entropy else 0, dtype=dtype)


@linear_backward.register_fake
def _fake_backward(
    dvalues: Tensor | None,
    dtail: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_dhidden, needs_dweight, needs_dbias, _, _ = options
    return (
        torch.empty_like(hidden) if needs_dhidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_dweight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_dbias and bias is not None else hidden.new_empty(0),
    )


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, softcap, scale, temperature, vocab_size, _, chunk_bytes, backend = (
        inputs
    )
    values, ids, tail, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, ids, values, tail)
    ctx.options = (softcap, scale, temperature, vocab_size)
    ctx.execution = (chunk_bytes, backend)


def _backward_topk(ctx: Any, dvalues: Any, dids: Any, dtail: Any, dentropy: Any) -> tuple[Any, ...]:
    return _gradients(ctx, dvalues, dtail)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden,
        weight,
        bias,
        ids,
        softcap,
        scale,
        temperature,
        vocab_size,
        _,
        _,
        chunk_bytes,
        backend,
    ) = inputs
    values, tail, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, ids, values, tail)
    ctx.options = (softcap, scale, temperature, vocab_size)
    ctx.execution = (chunk_bytes, backend)


def _backward_gather(ctx: Any, dvalues: Any, dtail: Any, dentropy: Any) -> tuple[Any, ...]:
    return _gradients(ctx, dvalues, dtail)


def _gradients(ctx: Any, dvalues: Tensor | None, dtail: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, ids, values, tail = ctx.saved_tensors
    if tail.numel() == 0:
        dtail = None  # gather(tail=False) has no tail to go through
    needs, options = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    gradients = linear_backward(
        dvalues,
        dtail,
        hidden,
        weight,
        bias,
        ids,
        values,
        tail,
        *ctx.options,
        *needs,
        *ctx.execution,
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*wanted, *[None] * len(options))


linear_topk.register_autograd(_backward_topk, setup_context=_save_topk)
linear_gather.register_autograd(_backward_gather, setup_context=_save_gather)

"""Definitions on full logits in eager PyTorch, which share no code with the package."""

from dataclasses import replace

import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, SparseLogits

OPTIONS = [
    {},
    {"softcap": None},
    {"with_bias": False},
    {"with_bias": False, "softcap": None, "scale": 1.0, "temperature": 1.0},
    {"padded": 0, "scale": -2.5},
    {"temperature": 3.0, "softcap": 0.5},
]


def head_in_float64(head):
    """Return the head for float64 logits. Only the bias is converted; backends do not use the
    weight.
    """
    return replace(head, bias=None if head.bias is None else head.bias.double())


def rows_for(backend, rows):
    """Return fewer rows for interpreted and emulated kernels, which are a thousand times slower."""
    return max(4, rows // 16) if backend in ("triton", "cuda-emulated") else rows


def make_logits(
    tokens=11, dim=7, vocab=53, padded=3, dtype=torch.float64, requires_grad=True, **options
):
    """Return random LazyLogits with all head options, unless `options` overrides them."""
    options = {"softcap": 3.0, "scale": 0.7, "temperature": 0.8} | options
    leading = tokens if isinstance(tokens, tuple) else (tokens,)
    with_bias = options.pop("with_bias", True)

    def operand(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    return LazyLogits(
        operand(*leading, dim),
        operand(vocab + padded, dim),
        operand(vocab + padded) if with_bias else None,
        vocab_size=vocab,
        **options,
    )


def full_logits(logits, dtype=torch.float64):
    """Return the logits z [..., V] by definition, computed in one dtype."""
    raw = logits.hidden.to(dtype) @ logits.weight[: logits.vocab_size].to(dtype).T
    if logits.bias is not None:
        raw = raw + logits.bias[: logits.vocab_size].to(dtype)
    raw = logits.scale * raw
    if logits.softcap is not None:
        raw = logits.softcap * torch.tanh(raw / logits.softcap)
    return raw / logits.temperature


def sorted_by_logit(z, k):
    """Return the ids [..., k] of the k largest logits of each row; the lower id wins ties."""
    return z.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def outside_lse(z, ids):
    """Return the logsumexp of each row without the given ids. If these are all ids, it is -inf with
    gradient 0.
    """
    columns = ids.masked_fill(ids < 0, z.shape[-1])
    on_support = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool)
    on_support = on_support.scatter_(-1, columns, True)[..., :-1]
    nothing_outside = on_support.all(-1)
    outside = z.masked_fill(on_support & ~nothing_outside[..., None], -torch.inf).logsumexp(-1)
    return outside.masked_fill(nothing_outside, -torch.inf)


def eager_sparse(z, ids):
    """Return differentiable SparseLogits of full logits z [..., V] at ids [..., K]; -1 is an empty
    slot.
    """
    values = z.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    return SparseLogits(values, ids, outside_lse(z, ids), z.shape[-1])


def operands(logits):
    return [t for t in (logits.hidden, logits.weight, logits.bias) if t is not None]


def gradients(loss, logits):
    """Return dhidden, dweight and dbias of a scalar loss; zeros for operands that it ignores."""
    grads = torch.autograd.grad(loss, operands(logits), allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g
        for g, t in zip(grads, operands(logits), strict=True)
    ]


def leaves(logits, dtype=None):
    """Return the same logits with operands that are leaves, in their dtype or another."""
    names = ("hidden", "weight", "bias")
    tensors = [getattr(logits, name) for name in names]
    copies = [None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_()
              for x in tensors]  # fmt: skip
    return replace(logits, **dict(zip(names, copies, strict=True)))


def in_float64(logits):
    """Return the same logits with float64 leaves."""
    return leaves(logits, torch.float64)


def exact(actual, expected):
    assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def random_ids(logits, k, empty=True):
    """Return distinct ids per row; with `empty`, some slots are empty or repeat another."""
    rows = logits.hidden.shape[:-1].numel()
    ids = torch.stack([torch.randperm(logits.vocab_size)[:k] for _ in range(rows)])
    if empty:
        ids[::2, 1] = -1
        ids[::3, 2] = logits.vocab_size + 1
        ids[1::2, k - 1] = ids[1::2, 0]
    return ids.reshape(*logits.hidden.shape[:-1], k)

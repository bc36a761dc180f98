"""Full-logits definitions in eager PyTorch that share no code with the package."""

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
    """The head for an epilogue on float64 logits; its weight is not used there."""
    return replace(head, bias=None if head.bias is None else head.bias.double())


def rows_for(backend, rows):
    """Fewer for interpreted and emulated kernels, which take a thousand times longer."""
    return max(4, rows // 16) if backend in ("triton", "cuda-emulated") else rows


def make_logits(
    tokens=11, dim=7, vocab=53, padded=3, dtype=torch.float64, requires_grad=True, **options
):
    """Random LazyLogits with every option on unless it is passed; gradients on all operands."""
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
    """z [..., V] by the definition, in one dtype throughout."""
    raw = logits.hidden.to(dtype) @ logits.weight[: logits.vocab_size].to(dtype).T
    if logits.bias is not None:
        raw = raw + logits.bias[: logits.vocab_size].to(dtype)
    raw = logits.scale * raw
    if logits.softcap is not None:
        raw = logits.softcap * torch.tanh(raw / logits.softcap)
    return raw / logits.temperature


def sorted_by_logit(z, k):
    """The ids of the k largest logits of each row, ties by the lower id: [..., k]."""
    return z.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def outside_lse(z, ids):
    """logsumexp of each row without the given ids; -inf, with gradient 0, where these are all."""
    columns = ids.masked_fill(ids < 0, z.shape[-1])
    on_support = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool)
    on_support = on_support.scatter_(-1, columns, True)[..., :-1]
    everything = on_support.all(-1)
    rest = z.masked_fill(on_support & ~everything[..., None], -torch.inf).logsumexp(-1)
    return rest.masked_fill(everything, -torch.inf)


def eager_sparse(z, ids):
    """SparseLogits of full logits z [..., V] at ids [..., K], -1 in empty slots; differentiable."""
    values = z.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    return SparseLogits(values, ids, outside_lse(z, ids), z.shape[-1])


def operands(logits):
    return [t for t in (logits.hidden, logits.weight, logits.bias) if t is not None]


def gradients(loss, logits):
    """dhidden, dweight and dbias of a scalar; zeros where an operand was not used."""
    grads = torch.autograd.grad(loss, operands(logits), allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g
        for g, t in zip(grads, operands(logits), strict=True)
    ]


def leaves(logits, dtype=None):
    """The same operands as leaves with a gradient, in their own dtype or another."""
    names = ("hidden", "weight", "bias")
    given = [getattr(logits, name) for name in names]
    fresh = [None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_()
             for x in given]  # fmt: skip
    return replace(logits, **dict(zip(names, fresh, strict=True)))


def in_float64(logits):
    """The same operands as float64 leaves."""
    return leaves(logits, torch.float64)


def exact(actual, expected):
    assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def random_ids(logits, k, empty=True):
    """Distinct ids per row, with some empty slots and repeats mixed in."""
    rows = logits.hidden.shape[:-1].numel()
    ids = torch.stack([torch.randperm(logits.vocab_size)[:k] for _ in range(rows)])
    if empty:
        ids[::2, 1] = -1
        ids[::3, 2] = logits.vocab_size + 1
        ids[1::2, k - 1] = ids[1::2, 0]
    return ids.reshape(*logits.hidden.shape[:-1], k)

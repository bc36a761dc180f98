"""Numerics of the operators on every backend: errors, ties, extreme logits, repeatability."""

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits
from tests.reference import (
    OPTIONS,
    exact,
    full_logits,
    gradients,
    in_float64,
    make_logits,
    outside_lse,
    rows_for,
    sorted_by_logit,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS[:4])
@pytest.mark.parametrize("with_tail", [True, False])
def test_error_is_at_most_twice_that_of_same_dtype_pytorch(backend, with_tail, dtype, options):
    """At fixed ids, compared with float64. The loss depends on every output."""
    # Slow backends take few rows. Without a tail no kernel reads the whole vocabulary, so they are
    # fast enough for 64 rows, and the largest error of few rows would be noise.
    tokens = rows_for(backend, 64) if with_tail else 64
    logits = make_logits(tokens=tokens, dim=96, vocab=1500, dtype=dtype, **options)
    ids = sorted_by_logit(full_logits(logits), 20)
    weights = torch.randn(tokens, 20, dtype=torch.float64)

    def with_gradients(values, tail, inputs):
        outputs = [values, tail] if with_tail else [values]
        loss = (values * weights.to(values.dtype)).sum() + sum(x.sum() for x in outputs[1:])
        return [*outputs, *gradients(loss, inputs)]

    s = logits.gather(ids, tail=with_tail, backend=backend)
    ours = with_gradients(s.values, s.tail, logits)

    def eager(inputs, compute_dtype):
        z = full_logits(inputs, compute_dtype)
        return with_gradients(z.gather(-1, ids), outside_lse(z, ids), inputs)

    reference = eager(in_float64(logits), torch.float64)
    for actual, same_dtype, expected in zip(ours, eager(logits, dtype), reference, strict=True):
        error = (actual.double() - expected).abs().max()
        peer = (same_dtype.double() - expected).abs().max()
        assert error <= 2 * peer


def test_ties_go_to_the_lower_id(backend):
    hidden = torch.eye(4, dtype=torch.float32)
    weight = torch.randint(0, 3, (9000, 4)).float()
    logits = LazyLogits(hidden, weight)
    for chunk_bytes in (1, None):
        s = logits.topk(50, chunk_bytes=chunk_bytes, backend=backend)
        assert torch.equal(s.ids, sorted_by_logit(hidden @ weight.T, 50))


def test_all_logits_equal(backend):
    logits = LazyLogits(torch.zeros(3, 4), torch.randn(100, 4))
    s = logits.topk(5, entropy=True, backend=backend)
    assert torch.equal(s.ids, torch.arange(5).expand(3, 5))
    assert_close(s.tail, torch.full((3,), 95.0).log())
    assert_close(s.entropy, torch.full((3,), 100.0).log())


def test_minus_infinity_never_enters_the_support(backend):
    bias = torch.zeros(50, dtype=torch.float64)
    bias[3:] = -torch.inf
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    logits = LazyLogits(hidden, torch.randn(50, 6, dtype=torch.float64), bias)
    s = logits.topk(5, entropy=True, backend=backend)
    assert torch.equal(s.ids[:, 3:], torch.full((4, 2), -1))
    assert torch.equal(s.tail, torch.full((4,), -torch.inf, dtype=torch.float64))
    z = full_logits(logits)[:, :3]
    exact(s.entropy, torch.distributions.Categorical(logits=z).entropy())
    weights = torch.randn(3, dtype=torch.float64)
    actual = torch.autograd.grad((s.log_probs[:, :3].exp() * weights).sum(), hidden)[0]
    probs = z.softmax(-1).gather(-1, s.ids[:, :3])
    exact(actual, torch.autograd.grad((probs * weights).sum(), hidden)[0])


def test_small_tail_is_exact(backend):
    """An accumulated tail keeps a mass of 1e-9, which 1 - sum(p) in float32 would lose."""
    hidden = torch.ones(3, 1)
    weight = torch.full((1000, 1), -12.0)
    weight[:2] = 16.0
    s = LazyLogits(hidden, weight).topk(2, backend=backend)
    expected = torch.log(torch.tensor(998.0)) - 12.0
    assert_close(s.tail, expected.expand(3), rtol=1e-6, atol=0)
    assert_close(
        s.log_tail, (expected - 16.0 - torch.log(torch.tensor(2.0))).expand(3), rtol=1e-6, atol=0
    )


def test_entropy_of_a_peaked_row_is_right_to_float32(backend):
    """At |z| = 50, lse - E[z] would have an error of 4e-6, a quarter of this entropy."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[50.0], [36.0], [35.0]])
    actual = LazyLogits(hidden, weight).topk(1, entropy=True, backend=backend).entropy
    expected = torch.distributions.Categorical(logits=weight.T.double()).entropy()
    assert_close(actual.double(), expected, rtol=0, atol=torch.finfo(torch.float32).eps)


def test_two_runs_are_bitwise_equal(backend):
    logits = make_logits(tokens=rows_for(backend, 70), vocab=3000, dtype=torch.float32)
    results = []
    for _ in range(2):
        s = logits.topk(9, entropy=True, backend=backend)
        results.append(
            [s.values, s.tail, s.entropy, *gradients(s.tail.sum() + s.values.sum(), logits)]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 53 * 2, 8 * 4096 * 3, None])
def test_chunk_sizes_do_not_matter(backend, chunk_bytes):
    logits = make_logits(tokens=9, vocab=9001, dim=5)
    results = []
    for size in (chunk_bytes, 1 << 30):
        s = logits.topk(7, chunk_bytes=size, entropy=True, backend=backend)
        loss = (s.log_probs * torch.arange(7)).sum() + s.log_tail.sum()
        results.append([s.values, s.ids, s.tail, s.entropy, *gradients(loss, logits)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", [True, False])
def test_a_weight_gradient_is_summed_over_tokens_in_float32(backend, tail, monkeypatch):
    """Of ones, which a sum in bfloat16 would stop counting at 256, in parts of one."""
    monkeypatch.setattr("opd_kernels.backends.sparse_rows._BLOCK_BYTES", 1)
    tokens = 600
    hidden = torch.ones(tokens, 8, dtype=torch.bfloat16)
    weight = torch.zeros(40, 8, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((tokens, 1), 7)
    s = LazyLogits(hidden, weight).gather(ids, tail=tail, backend=backend)
    (dweight,) = torch.autograd.grad(s.values.sum(), weight)
    assert torch.equal(dweight[7], torch.full((8,), 600.0, dtype=torch.bfloat16))
    assert dweight.count_nonzero() == 8

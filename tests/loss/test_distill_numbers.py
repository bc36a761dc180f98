"""Numerics of the loss on every backend: small tails, threads, repeatability."""

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, distillation_loss, forward_kl, jsd, reverse_kl
from tests.device import DEVICE
from tests.reference import make_logits, rows_for

OBJECTIVES = {"reverse": reverse_kl, "forward": forward_kl}


def with_tail(log_tail, rows, vocab=3000, support=20):
    """Return float32 logits. Tokens after the first `support` have the total mass exp(log_tail)."""
    z = torch.randn(rows, vocab, dtype=torch.float64)
    on, off = z[:, :support], z[:, support:]
    on = on.log_softmax(-1) + torch.log1p(-torch.tensor(log_tail).double().exp())
    off = (0.3 * off).log_softmax(-1) + log_tail
    return torch.cat([on, off], dim=-1).float()


def loss_and_gradient(z, zt, objective, **options):
    """Hidden states are unit vectors, so that the weight holds the logits."""
    unit = torch.eye(z.shape[0], dtype=z.dtype)
    student = LazyLogits(unit, z.T.contiguous().requires_grad_())
    out = distillation_loss(
        student, LazyLogits(unit, zt.T.contiguous()), k=20, objective=objective, **options
    )
    return out.per_token, torch.autograd.grad(out.loss, student.weight)[0].T


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("exponent", range(3, 9))
def test_a_bucket_for_a_small_tail_is_right_to_a_ten_thousandth(
    backend, method, objective, exponent
):
    """The student's tail is 10^-exponent, the teacher's a third of it. Compared with float64."""
    log_tail = -exponent * torch.tensor(10.0).log().item()
    z, zt = with_tail(log_tail, 4), with_tail(log_tail - 1.1, 4)
    bucket = partial(OBJECTIVES[objective], tail="bucket")
    loss, dz = loss_and_gradient(z, zt, bucket, method=method, backend=backend)
    exact = {"method": method, "backend": "torch"}
    true_loss, true_dz = loss_and_gradient(z.double(), zt.double(), bucket, **exact)
    assert_close(loss.double(), true_loss, rtol=1e-4, atol=0)
    for part in (slice(0, 20), slice(20, None)):  # compare each part on its own scale
        error = (dz[:, part] - true_dz[:, part]).norm(dim=-1)
        assert (error <= 1e-4 * true_dz[:, part].norm(dim=-1)).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_full_vocabulary_error_is_at_most_twice_that_of_log_softmax(backend, beta):
    """Errors of loss and gradient of peaked logits, as norms over all rows."""
    z, zt = 3 * torch.randn(2, 24, 131)
    objective = partial(jsd, beta=beta)
    options = {"support": "full"}
    ours = loss_and_gradient(z, zt, objective, backend=backend, **options)
    wide = z.double(), zt.double()
    reference = loss_and_gradient(*wide, objective, backend="torch", **options)
    z.requires_grad_()
    log_p, log_q = z.log_softmax(-1), zt.log_softmax(-1)
    if beta in (0.0, 1.0):
        first, second = (log_p, log_q) if beta else (log_q, log_p)
        eager = (first.exp() * (first - second)).sum(-1)
    else:
        log_m = ((1 - beta) * log_p.exp() + beta * log_q.exp()).log()
        eager = beta * (log_q.exp() * (log_q - log_m)).sum(-1)
        eager = eager + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)
    theirs = eager.detach(), torch.autograd.grad(eager.mean(), z)[0]
    for actual, peer, expected in zip(ours, theirs, reference, strict=True):
        error, peer_error = (x.double() - expected for x in (actual, peer))
        assert error.norm() <= 2 * peer_error.norm()


def results(options, threads):
    generator = torch.Generator(DEVICE).manual_seed(7)
    sizes = (rows_for(options["backend"], 130), 5000, 5000)
    hidden, weight, t_weight = (torch.randn(n, 48, generator=generator) for n in sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        student = LazyLogits(hidden.requires_grad_(), weight.requires_grad_())
        out = distillation_loss(student, LazyLogits(hidden.detach(), t_weight), **options)
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "one_pass"},
        {"method": "recompute"},
        {"support": "full"},
        {"gradient_filter": 2.0**-14},
        {"objective": partial(reverse_kl, tail="renormalize")},
    ],
)
def test_two_runs_are_bitwise_equal_and_threads_matter_to_rounding_only(backend, options):
    options = options | {"backend": backend}
    runs = [results(options, threads) for threads in (2, 2, 1, 3)]
    for a, b in zip(*runs[:2], strict=True):
        assert torch.equal(a, b)
    for one, other in itertools.combinations(runs, 2):
        for a, b in zip(one, other, strict=True):
            # A product may sum in another order with other threads: allow a few roundings.
            assert_close(a, b, rtol=1e-5, atol=4e-6 * b.abs().max().item())


@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_nan_reaches_loss_and_gradient(backend, method, tail, where):
    """A loss that reads only S is NaN too, although no NaN is selected into S."""
    student, teacher = make_logits(tokens=4), make_logits(tokens=4, requires_grad=False)
    with torch.no_grad():
        if where == "hidden":
            student.hidden[2] = torch.nan
        else:
            student.weight[7, 3] = torch.nan  # one logit of every row
    objective = partial(reverse_kl, tail=tail)
    options = {"k": 3, "objective": objective, "method": method, "backend": backend}
    output = distillation_loss(student, teacher, **options)
    output.loss.backward()
    is_nan = torch.arange(4) == 2 if where == "hidden" else torch.ones(4, dtype=torch.bool)
    assert torch.equal(output.per_token.isnan(), is_nan)
    assert torch.equal(student.hidden.grad.isnan().any(1), is_nan)

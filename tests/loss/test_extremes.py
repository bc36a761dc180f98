"""Losses and gradients of extreme logits and shapes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, SparseLogits, distillation_loss, forward_kl, reverse_kl
from tests.distill_cases import (
    METHODS,
    OBJECTIVES,
    SUPPORTS,
    VOCAB,
    K,
    assert_same,
    eager_per_token,
    ids_of,
    objectives_for,
    pair,
    summed_loss,
    support_ids,
)
from tests.reference import eager_sparse, full_logits, gradients, in_float64, leaves

INF = torch.inf


def scaled(factor):
    return lambda model: replace(model, scale=factor)


def constant(model):
    return replace(model, hidden=torch.zeros_like(model.hidden), bias=torch.ones_like(model.bias))


def one_hot(model):
    """One logit is so large that its probability is 1 in float32."""
    bias = torch.zeros_like(model.bias)
    bias[3] = 200.0
    return replace(model, bias=bias)


def thin_tail(model):
    """K tokens have all of the mass except about 1e-9."""
    bias = torch.full_like(model.bias, -24.0)
    bias[7 : 7 + K] = 0.0
    return replace(model, scale=0.3, bias=bias / 0.3)


EXTREMES = {
    "logits of ten thousand": (scaled(4e3), 1.0),
    "all logits equal": (constant, 1.0),
    "subnormal logits": (scaled(1e-40), 1.0),
    "one-hot": (one_hot, 1.0),
    "a tail of 1e-9": (thin_tail, 1.0),
    "temperature 1e-3": (scaled(1.0), 1e-3),
    "temperature 1e3": (scaled(1.0), 1e3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_error_is_at_most_twice_that_of_float32_pytorch(compiled_backend, extreme, support, method):
    """Compared with the float64 definition. The error may exceed twice PyTorch's by a few roundings
    of the largest logit, in the loss or in the gradient of a logit.
    """
    walk = {"method": method, "backend": compiled_backend}
    change, temperature = EXTREMES[extreme]
    student, teacher = (
        leaves(change(model), torch.float32)
        for model in pair(softcap=None, scale=1.0, temperature=temperature)
    )
    wide, wide_teacher = in_float64(student), in_float64(teacher)
    z, zt = full_logits(wide).detach(), full_logits(wide_teacher).detach()
    for name, (objective, k) in objectives_for(support).items():
        ids = ids_of(z.shape[0], k) if support == "ids" else support_ids(support, z, zt, k)

        def eager(student, teacher, dtype, ids=ids, objective=objective):
            rows = (eager_sparse(full_logits(x, dtype), ids) for x in (student, teacher))
            loss = objective(*rows)
            return loss.detach(), *gradients(loss.sum(), student)

        reference = eager(wide, wide_teacher, torch.float64)
        peer = eager(student, teacher, torch.float32)
        out = summed_loss(student, teacher, support, k, objective=objective, **walk)
        ours = out.per_token, *gradients(out.loss, student)
        rounding = 2.0**-22 * max(1.0, z.abs().max().item(), zt.abs().max().item())
        largest = max(student.hidden.abs().max().item(), student.weight.abs().max().item())
        chain = max(1.0, student.scale / temperature * largest)  # bounds d logit / d operand
        margins = [4 * rounding, *[rounding * chain] * 3]
        for actual, same, expected, margin in zip(ours, peer, reference, margins, strict=True):
            error, allowed = ((x.double() - expected).norm() for x in (actual, same))
            assert expected.isfinite().all()
            assert error <= 2 * allowed + margin, (name, error, allowed, margin)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("live", [3, 20])
def test_logits_of_minus_infinity_are_as_good_as_absent(compiled_backend, live, support, method):
    """A bias of -inf in both models leaves 3 or 20 tokens; compared with heads of only these."""
    models, cut = [], []
    for model in pair(softcap=None):
        masked = leaves(model)
        with torch.no_grad():
            masked.bias[live:] = -INF
        models.append(masked)
        cut.append(replace(leaves(model), vocab_size=live))
    for name, (objective, k) in objectives_for(support).items():
        out = summed_loss(
            *models, support, k, objective=objective, method=method, backend=compiled_backend
        )
        if support == "ids":
            given = ids_of(models[0].hidden.shape[0], k)
            ids = given.masked_fill(given >= live, -1)
        else:
            z, zt = (full_logits(x).detach() for x in cut)
            ids = support_ids(support, z, zt, min(k, live))
        if k == 1 and (ids < 0).any():
            continue  # a sampled token cannot have the probability 0
        expected = objective(*(eager_sparse(full_logits(x), ids) for x in cut))
        assert_close(out.per_token, expected.detach(), rtol=1e-12, atol=1e-12, msg=name)
        assert_same(gradients(out.loss, models[0]), gradients(expected.sum(), cut[0]), atol=1e-11)


SERVED = {
    "-inf": [-0.5, -2.0, -INF],
    "above 0 by rounding": [1e-4, -INF, -INF],
    "p = 1 exactly": [0.0, -INF, -80.0],
    "P = 1 exactly": [-1.0986123] * 3,
    "P = 1 - 1e-9": [-1e-9, -27.7, -40.0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", SERVED)
@pytest.mark.parametrize("support", ["teacher", "intersection", "ids"])
def test_a_servers_log_probs_at_the_edges(compiled_backend, support, answer, method):
    """Compared with p and q in float64, where the teacher's tail has a mass of at least 2^-24."""
    log_q = torch.tensor(SERVED[answer])
    ids = torch.tensor([[1, 4, 6], [2, 3, 8]])
    teacher = SparseLogits.from_log_probs(log_q.expand(2, 3), ids, vocab_size=9)
    hidden, weight = torch.randn(2, 3), torch.randn(9, 3)
    live = (log_q > -INF).double()
    for tail in ("drop", "bucket"):
        for objective in (reverse_kl, forward_kl):
            student = LazyLogits(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
            out = distillation_loss(
                student, teacher, k=3 if support != "intersection" else 9, reduction="sum",
                support=ids if support == "ids" else support, missing="drop", method=method,
                objective=partial(objective, tail=tail), backend=compiled_backend,
            )  # fmt: skip
            wide = hidden.double().requires_grad_()
            log_p = (wide @ weight.double().T).log_softmax(-1).gather(-1, ids)
            q = log_q.double().exp().expand(2, 3)
            rest = 1 - (log_p.exp() * live).sum(-1, keepdim=True)
            q_rest = (1 - q.sum(-1, keepdim=True)).clamp_min(2.0**-24)
            p, q = torch.cat([log_p.exp(), rest], -1), torch.cat([q, q_rest], -1)
            log_ratio = torch.cat([log_p, rest.log()], -1)
            q /= q.sum(-1, keepdim=True)  # rounding may make the mass exceed 1
            log_ratio = log_ratio - q.log()
            keep = torch.cat([live, torch.tensor([float(tail == "bucket")])]) > 0
            log_ratio = log_ratio.masked_fill(~keep, 0.0)
            first = p * log_ratio if objective is reverse_kl else -q * log_ratio
            if tail == "drop":  # the generalised KL
                first = first + (q - p if objective is reverse_kl else p - q)
            expected = (first * keep).sum(-1)
            assert_close(out.per_token, expected.detach().float(), rtol=1e-5, atol=1e-5)
            actual = gradients(out.loss, student)[0]
            exact = torch.autograd.grad(expected.sum(), wide)[0]
            assert_close(actual, exact.float(), rtol=1e-4, atol=1e-5)


def test_log_probs_well_above_0_are_refused():
    with pytest.raises(ValueError, match="sum to at most 1, got 1"):
        SparseLogits.from_log_probs(torch.tensor([[0.02]]), torch.tensor([[3]]), vocab_size=9)


SHAPES = {
    "N = 0": (0, 3, 7, 2),
    "V = 1": (2, 3, 1, 1),
    "D = 1": (3, 1, 7, 2),
    "K = V": (3, 2, 4, 4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_shapes(compiled_backend, shape, support, method):
    tokens, dim, vocab, k = SHAPES[shape]
    student, teacher = (
        LazyLogits(torch.randn(tokens, dim).double(), torch.randn(vocab, dim).double())
        for _ in range(2)
    )
    ids = torch.arange(k).repeat(tokens, 1)
    for name in OBJECTIVES:
        objective = OBJECTIVES[name]
        if shape == "V = 1" and name == "renormalize":
            continue  # K = 1 is refused
        model = leaves(student)
        out = distillation_loss(
            model, teacher, k=k, support=ids if support == "ids" else support, method=method,
            objective=objective, backend=compiled_backend, reduction="sum",
        )  # fmt: skip
        z, zt = full_logits(model), full_logits(teacher)
        chosen = ids if support == "ids" else support_ids(support, z.detach(), zt, k)
        expected = objective(*(eager_sparse(x, chosen) for x in (z, zt)))
        assert_close(out.per_token, expected.detach(), rtol=1e-12, atol=1e-13, msg=name)
        assert_same(gradients(out.loss, model), gradients(expected.sum(), model))
        if vocab == 1:
            assert (out.per_token == 0).all()


def test_heads_without_a_dimension_are_refused():
    with pytest.raises(ValueError, match="D >= 1"):
        LazyLogits(torch.zeros(2, 0), torch.zeros(5, 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_beyond_the_operands_range_are_finite(compiled_backend, dtype, support, method):
    """Products exceed 65,504, the largest float16 number, but logits are float32."""
    walk = {"method": method, "backend": compiled_backend}
    operands = [(300 * torch.randn(n, 6)).to(dtype) for n in (4, VOCAB, 4, VOCAB)]
    student = LazyLogits(*(x.requires_grad_() for x in operands[:2]))
    teacher = LazyLogits(*operands[2:])
    wide, wide_teacher = in_float64(student), in_float64(teacher)
    z, zt = full_logits(wide).detach(), full_logits(wide_teacher).detach()
    assert z.abs().max() > 65504
    for name, (objective, k) in objectives_for(support).items():
        out = summed_loss(student, teacher, support, k, objective=objective, **walk)
        ids = ids_of(4, k) if support == "ids" else support_ids(support, z, zt, k)
        expected = eager_per_token(objective, wide, wide_teacher, ids)
        assert_close(out.per_token.double(), expected.detach(), rtol=1e-5, atol=0.1, msg=name)
        for actual, exact in zip(
            gradients(out.loss, student), gradients(expected.sum(), wide), strict=True
        ):
            assert actual.isfinite().all() or exact.abs().max() > torch.finfo(dtype).max

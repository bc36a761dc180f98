"""Rows that are infinite or NaN: what they come to, and that it stays in them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, distillation_loss, forward_kl, jsd, reverse_kl
from tests.distill_cases import METHODS, SUPPORTS, K, assert_same, ids_of, objectives_for, pair
from tests.reference import full_logits, gradients, leaves

NAN, INF = torch.nan, torch.inf


def clash(on_student):
    """Two rows of unit vectors; in one model the first row has a logit of -inf at id 4."""
    hidden = torch.eye(2, dtype=torch.float64)
    weights = [torch.randn(7, 2, dtype=torch.float64) for _ in range(2)]
    weights[0 if on_student else 1][4, 0] = -INF
    # A product of -inf with the other row's 0 is NaN, so these logits come as a product of -1e200.
    models = []
    for weight in weights:
        extra = torch.zeros(7, 1, dtype=torch.float64)
        extra[weight[:, 0] == -INF] = -1e200
        beside = torch.tensor([[1e200], [0.0]], dtype=torch.float64)
        weight = torch.cat([weight.masked_fill(weight == -INF, 0.0), extra], dim=1)
        models.append(LazyLogits(torch.cat([hidden, beside], 1), weight))
    return leaves(models[0]), models[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", ["full", "ids", "union"])
def test_a_divergence_is_infinite_where_a_probability_is_zero_on_one_side(
    compiled_backend, support, method
):
    ids = torch.arange(7).expand(2, 7) if support == "ids" else support
    options = {
        "k": 7,
        "support": ids,
        "reduction": "sum",
        "method": method,
        "backend": compiled_backend,
    }
    student, teacher = clash(on_student=False)
    for objective in (reverse_kl, partial(reverse_kl, stop_gradient=False)):
        out = distillation_loss(student, teacher, objective=objective, **options)
        z, zt = full_logits(student).detach(), full_logits(teacher)
        log_p, log_q = z.log_softmax(-1), zt.log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert out.per_token[0] == INF
        assert_close(out.per_token, expected)
        dhidden = gradients(out.loss, student)[0]
        assert dhidden[1].isfinite().all()
        for compact in (True, False):  # the infinite row is left out, gradient and all
            weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
            kept = distillation_loss(
                student, teacher, objective=objective, token_weights=weights, compact=compact,
                **options,
            )  # fmt: skip
            assert_close(kept.loss, expected[1])
            grads = gradients(kept.loss, student)
            assert all(g.isfinite().all() for g in grads)
            assert_close(grads[0][1], dhidden[1])
    # The other way, the teacher's mass is where the student has none: p Q - q is finite all the
    # same. A product's gradient with the overflowing factor of 1e200 is not compared.
    for objective in (forward_kl, jsd):
        student, teacher = clash(on_student=True)
        out = distillation_loss(student, teacher, objective=objective, **options)
        assert (out.per_token[0] == INF) == (objective is forward_kl)
        assert out.per_token[1].isfinite()
        z, zt = full_logits(student).detach(), full_logits(teacher)
        p, q = z.softmax(-1), zt.softmax(-1)
        dweight = gradients(out.loss, student)[1][:, :2]
        if objective is forward_kl:
            assert_close(dweight, (p - q).T)
        assert dweight.isfinite().all()
        student, teacher = clash(on_student=False)
        out = distillation_loss(student, teacher, objective=objective, **options)
        assert out.per_token.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(out.loss, student))


BAD = 2
POISONS = {
    "NaN": (NAN, 0.0),
    "a product of +inf": (1e300, 1e300),
    "a product of -inf": (-1e300, 1e300),  # a row of -inf throughout
}


def poisoned(kind, model):
    """The model with one row's hidden state bad in a dimension that all other rows have at 0."""
    hidden, weight = model.hidden.detach(), model.weight.detach()
    in_row, in_weight = POISONS[kind]
    column = hidden.new_zeros(hidden.shape[0], 1)
    column[BAD] = in_row
    beside = weight.new_full((weight.shape[0], 1), in_weight)
    return replace(
        model, hidden=torch.cat([hidden, column], 1), weight=torch.cat([weight, beside], 1)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", POISONS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_bad_row_stays_one_row(compiled_backend, who, kind, support, method):
    """Its loss is NaN, or 0 where nothing is on S; no other row's loss or gradient changes. With a
    token weight of 0 it does not reach dweight either.
    """
    student, teacher = pair(softcap=None)
    others = torch.arange(student.hidden.shape[0]) != BAD
    if who == "student":
        student = poisoned(kind, student)
    else:
        teacher = poisoned(kind, teacher)
    objectives = objectives_for(support)
    for name in set(objectives) - {"biased", "forward_bucket"}:  # as reverse_kl and bucket are
        objective, k = objectives[name]
        options = {"objective": objective, "method": method, "backend": compiled_backend}
        ids = ids_of(others.numel(), k)

        def loss(rows, options=options, ids=ids, k=k, **more):
            model = leaves(student)
            out = distillation_loss(
                model[rows], teacher[rows], k=k, reduction="sum",
                support=ids[rows] if support == "ids" else support, **options, **more,
            )  # fmt: skip
            return out, gradients(out.loss, model)

        expected, grads = loss(others)
        out, dirty = loss(slice(None))
        bad = out.per_token[BAD]
        no_support = kind == "a product of -inf" and (
            support in ("intersection", who) or name == "renormalize"
        )
        assert bad.isnan() or (no_support and bad == 0), (name, bad)
        assert_close(out.per_token[others], expected.per_token)
        # dhidden beside a weight of 1e300 is that times a sum of logit gradients, which is 0.
        size = student.weight.detach()[0].abs()
        size = size.where(size == 1e300, 1.0)
        assert_same([dirty[0][others] / size], [grads[0][others] / size])
        weighted, clean = loss(slice(None), token_weights=others.double(), compact=False)
        assert_close(weighted.loss, expected.loss)
        assert (clean[0][BAD] == 0).all()
        assert_same([clean[0] / size, clean[1]], [grads[0] / size, grads[1]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, jsd])
def test_a_model_without_mass_on_the_support_has_nothing_to_renormalise(
    objective, backend_name, method
):
    student, teacher = pair(softcap=None)
    for side in range(2):
        models = [leaves(student), leaves(teacher)]
        with torch.no_grad():
            models[side].bias[:K] = -INF
        ids = torch.arange(K).repeat(11, 1)
        ids[3:] += K
        out = distillation_loss(
            *models, support=ids, k=K, objective=partial(objective, tail="renormalize"),
            method=method, backend=backend_name,
        )  # fmt: skip
        assert (out.per_token[:3] == 0).all()
        assert (out.per_token[3:] > 0).all()
        grads = gradients(out.loss, models[0])
        assert (grads[0][:3] == 0).all()
        assert all(g.isfinite().all() for g in grads)

"""Token weights of any dtype, and tokens of weight 0, which may hold NaN or infinity."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, distillation_loss
from tests.distill_cases import TOKENS, VOCAB, K, assert_same, pair
from tests.reference import full_logits, gradients


def test_reduction_none_keeps_the_place_of_dropped_tokens():
    student, teacher = pair()
    weights = torch.ones(TOKENS)
    weights[[0, 4]] = 0
    out = distillation_loss(student, teacher, k=K, reduction="none", token_weights=weights)
    whole = distillation_loss(student, teacher, k=K, reduction="none")
    assert_close(out.loss, whole.loss.masked_fill(weights == 0, 0.0))
    assert (out.student.ids[[0, 4]] == -1).all()
    assert (out.student.mass[[0, 4]] == 0).all()


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_dropped_tokens_may_hold_anything(method, support):
    """compact=True removes tokens of weight 0 before the first product, so their NaN is ignored."""
    student, teacher = pair()
    weights = torch.ones(TOKENS)
    weights[2] = 0
    kept = weights.bool()
    run = partial(distillation_loss, k=K, method=method, support=support)
    expected = run(student[kept], teacher[kept])
    hidden = student.hidden.detach().clone()
    hidden[2] = torch.nan
    hidden.requires_grad_()
    dirty = LazyLogits(hidden, student.weight, student.bias, 3.0, 0.7, 0.8, VOCAB)
    out = run(dirty, teacher, token_weights=weights)
    assert_close(out.loss, expected.loss)
    grads = gradients(out.loss, dirty)
    assert (grads[0][2] == 0).all()
    assert_same(grads[1:], gradients(expected.loss, student)[1:])
    loose = run(student, teacher, token_weights=weights, compact=False)
    assert_close(loose.loss, expected.loss)
    assert_same(gradients(loose.loss, student)[1:], grads[1:])


def test_what_a_graph_records_has_no_shape_that_depends_on_weights(monkeypatch):
    student, teacher = pair()
    weights = torch.ones(TOKENS)
    weights[2] = 0
    expected = distillation_loss(student, teacher, k=K, token_weights=weights).loss
    monkeypatch.setattr("opd_kernels.loss.distill._is_recorded", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # what waits for the device
    assert_close(distillation_loss(student, teacher, k=K, token_weights=weights).loss, expected)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.int64])
def test_weights_of_any_dtype_average_as_float32_ones_do(method, dtype):
    """A sum of weights in their own dtype would round 257 in bfloat16 and overflow in float16."""
    student, teacher = (
        LazyLogits(torch.randn(301, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True))
        for _ in range(2)
    )
    run = partial(distillation_loss, student, teacher, k=3, method=method)
    expected = run()
    for scale in (1, 30_000) if dtype == torch.float16 else (1,):
        out = run(token_weights=(scale * torch.ones(301)).to(dtype))
        assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
        assert_close(gradients(out.loss, student)[0], gradients(run().loss, student)[0])


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full", "union"])
@pytest.mark.parametrize("poison", ["student", "teacher", "infinite loss"])
def test_rows_of_weight_zero_do_no_harm_without_compact(method, support, poison):
    student, teacher = pair()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    weights[2] = 0
    run = partial(distillation_loss, k=K, method=method, support=support, compact=False)
    expected = run(student, teacher, token_weights=weights)
    bias = teacher.bias.clone()
    hidden = [x.hidden.detach().clone() for x in (student, teacher)]
    if poison == "infinite loss":
        clash = full_logits(student)[2].argmax()
        bias[clash] = -torch.inf
        weights[[clash in row for row in student.topk(K).ids]] = 0
    else:
        hidden[poison == "teacher"][2] = torch.nan
    dirty = replace(student, hidden=hidden[0].requires_grad_())
    out = run(dirty, replace(teacher, hidden=hidden[1], bias=bias), token_weights=weights)
    grads = gradients(out.loss, dirty)
    assert (grads[0][weights == 0] == 0).all()
    if poison == "infinite loss":
        is_finite = support != "full"  # where q = 0 makes the loss of every row infinite
        assert torch.isfinite(out.loss) == is_finite
        assert all(torch.isfinite(g).all() for g in grads) or not is_finite
    else:
        assert_close(out.loss, expected.loss)
        assert_same(grads[1:], gradients(expected.loss, student)[1:])


def test_a_row_of_weight_zero_with_an_infinite_loss():
    student = LazyLogits(torch.eye(2), torch.eye(3)[:, :2].clone().requires_grad_())
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    teacher = LazyLogits(torch.zeros(2, 1), torch.zeros(3, 1), bias)
    ids, weights = torch.tensor([[2], [0]]), torch.tensor([0.0, 1.0])
    grads = [
        torch.autograd.grad(
            distillation_loss(
                student, teacher, support=ids, token_weights=weights, compact=compact, method=method
            ).loss,
            student.weight,
        )[0]
        for compact in (True, False)
        for method in ("one_pass", "recompute")
    ]
    assert grads[0].abs().max() > 0
    for gradient in grads[1:]:
        assert_close(gradient, grads[0])


@pytest.mark.parametrize("compact", [True, False])
def test_rows_of_weight_zero_get_no_gradient_without_a_reduction(backend, compact):
    """The bias would show it: "none" does not multiply the losses by their weights."""
    student, teacher = pair()
    weights = torch.ones(TOKENS, dtype=torch.float64)
    weights[::3] = 0.0
    run = partial(distillation_loss, k=K, reduction="none", backend=backend)
    out = run(student, teacher, token_weights=weights, compact=compact)
    kept = weights != 0
    expected = run(student[kept], teacher[kept])
    assert_same(gradients(out.loss.sum(), student), gradients(expected.loss.sum(), student))

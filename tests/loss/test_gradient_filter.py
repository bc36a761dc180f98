"""gradient_filter, compared with the gradient of full logits without its small entries."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, distillation_loss, forward_kl, jsd, reverse_kl
from opd_kernels.backends.sparse_rows import SparseRows
from tests.distill_cases import TOKENS, VOCAB, K, assert_same, pair
from tests.reference import OPTIONS, eager_sparse, full_logits, operands, rows_for, sorted_by_logit

EPS = 0.02  # with 53 tokens, most rows have entries below and above it


def filtered(student, teacher, objective, weights):
    """The loss on full logits, its filtered gradients, and the mass of the dropped entries."""
    z = full_logits(student)
    leaf = z.detach().requires_grad_()
    ids = sorted_by_logit(leaf.detach(), K)
    per_token = objective(eager_sparse(leaf, ids), eager_sparse(full_logits(teacher), ids))
    loss = (per_token * weights).sum() / weights.sum()
    dz = torch.autograd.grad(loss, leaf)[0]
    p = leaf.detach().softmax(-1)
    small = (p < EPS).scatter(-1, ids, False)
    gradients = torch.autograd.grad(z, operands(student), dz.masked_fill(small, 0.0))
    return loss.detach(), gradients, (p * small).sum(-1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "objective", [reverse_kl, forward_kl, partial(reverse_kl, tail="bucket"), jsd]
)
def test_only_small_entries_outside_the_support_are_left_out(backend, options, objective):
    student, teacher = pair(**options)
    weights = torch.rand(TOKENS, dtype=torch.float64)
    weights[3] = 0
    loss, expected, dropped = filtered(student, teacher, objective, weights)
    assert dropped.max() > 0.01
    for chunk_bytes in (None, VOCAB * 8 * 3):
        out = distillation_loss(
            student, teacher, k=K, objective=objective, token_weights=weights,
            gradient_filter=EPS, chunk_bytes=chunk_bytes, backend=backend,
        )  # fmt: skip
        actual = torch.autograd.grad(out.loss, operands(student))
        assert_same([out.loss, *actual], [loss, *expected])
        assert_close(out.dropped, dropped * (weights != 0), rtol=1e-9, atol=1e-12)


def test_a_filter_below_every_probability_changes_nothing(backend):
    student, teacher = pair()
    exact = distillation_loss(student, teacher, k=K, method="one_pass", backend=backend)
    expected = torch.autograd.grad(exact.loss, operands(student))
    out = distillation_loss(student, teacher, k=K, gradient_filter=1e-300, backend=backend)
    assert_same(torch.autograd.grad(out.loss, operands(student)), expected)
    assert out.dropped.max() < 1e-12


def test_nothing_is_dropped_where_the_loss_stays_on_the_support(backend):
    student, teacher = pair()
    objective = partial(reverse_kl, tail="renormalize")
    out = distillation_loss(
        student, teacher, k=K, objective=objective, gradient_filter=0.5, backend=backend
    )
    assert torch.equal(out.dropped, torch.zeros(TOKENS, dtype=torch.float64))


def test_a_row_of_nan_is_not_filtered_away(backend):
    student, teacher = pair()
    hidden = student.hidden.detach().clone()
    hidden[4, 2] = torch.nan
    student = replace(student, hidden=hidden.requires_grad_())
    out = distillation_loss(student, teacher, k=K, gradient_filter=EPS, backend=backend)
    dhidden = torch.autograd.grad(out.loss, student.hidden)[0]
    assert dhidden[4].isnan().all()


def test_without_gradient_nothing_is_filtered():
    student, teacher = pair()
    with torch.no_grad():
        out = distillation_loss(student, teacher, k=K, gradient_filter=EPS)
    assert out.dropped is None
    assert_close(out.loss, distillation_loss(student, teacher, k=K).loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtered_gradients_repeat_bitwise_and_are_near_float64(backend, dtype):
    sizes = (rows_for(backend, 70), 3000, 3000)
    hidden, weight, teacher = (torch.randn(rows, 32).to(dtype) for rows in sizes)

    def run(hidden, weight, teacher):
        student = LazyLogits(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        out = distillation_loss(
            student, LazyLogits(hidden, teacher), gradient_filter=2.0**-12, backend=backend
        )
        return torch.autograd.grad(out.loss, operands(student))

    first, second = run(hidden, weight, teacher), run(hidden, weight, teacher)
    expected = run(hidden.double(), weight.double(), teacher.double())
    for a, b, e in zip(first, second, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        scale = e.abs().max().item()
        assert_close(a.double(), e, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_rows_multiply_as_a_dense_matrix(dtype):
    ids = torch.stack([torch.randperm(40)[:9] for _ in range(300)])
    ids[::3, 2:5] = -1
    ids[5] = -1
    values = torch.randn(300, 9, dtype=torch.float64)
    dense = values.new_zeros(300, 41).scatter_(1, ids % 41, values)[:, :40]
    weight, hidden = torch.randn(40, 6).to(dtype), torch.randn(300, 6, dtype=torch.float64)
    entries = SparseRows.of_support(ids, values)
    dhidden, dweight, dbias = torch.randn_like(hidden), hidden[:40].clone(), hidden[:40, 0].clone()
    expected = [dhidden + dense @ weight.double(), dweight + dense.T @ hidden, dbias + dense.sum(0)]
    entries.add_to_hidden_(dhidden, weight)
    entries.add_to_weight_(dweight, hidden)
    entries.add_to_bias_(dbias)
    assert_same([dhidden, dweight, dbias], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_filter": 0.0}, "expected a probability"),
        ({"gradient_filter": 1}, "expected a probability"),
        ({"gradient_filter": EPS, "method": "recompute"}, "only one_pass can filter"),
        ({"gradient_filter": EPS, "reduction": "none"}, "only one_pass can filter"),
        ({"gradient_filter": EPS, "support": "full"}, "no entries outside S"),
    ],
)
def test_what_cannot_be_filtered_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"gradient_filter: .*{message}"):
        distillation_loss(*pair(), k=K, **arguments)

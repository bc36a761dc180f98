"""The reverse KL's Triton kernel against autograd through divergences.reverse_kl."""

from functools import partial

import pytest
import torch

from opd_kernels import SparseLogits, distillation_loss, jsd, reverse_kl
from opd_kernels.backends import available_backends, select_backend
from opd_kernels.objective import reverse_kl_options
from tests.reference import make_logits
from tests.test_triton import assert_no_worse

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = [
    {},
    {"stop_gradient": False},
    {"tail": "bucket"},
    {"tail": "bucket", "stop_gradient": False},
]
VOCAB = 2_000


@pytest.fixture
def kernels():
    return select_backend("triton", DEVICE)


def make_rows(rows, k):
    """Values of two models on the same ids, with an empty slot and a row without a tail."""
    values, teacher = (4 * torch.randn(rows, k, device=DEVICE) for _ in range(2))
    tails = torch.randn(2, rows, device=DEVICE)
    if k > 2:
        values[:, 1] = teacher[:, 1] = -torch.inf
    tails[:, rows // 2] = -torch.inf
    return values, tails[0], teacher, tails[1]


def by_autograd(tensors, upstream, options, dtype):
    values, tail, teacher, teacher_tail = (t.to(dtype) for t in tensors)
    values.requires_grad_()
    tail.requires_grad_()
    ids = torch.arange(values.shape[1], device=DEVICE).expand(values.shape)
    s = SparseLogits(values, ids, tail, VOCAB)
    loss = reverse_kl(s, SparseLogits(teacher, ids, teacher_tail, VOCAB), **options)
    return loss.detach(), *torch.autograd.grad(loss, (values, tail), upstream.to(dtype))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 3), (70, 20), (3, 1024)])
def test_loss_and_gradient(kernels, options, rows, k):
    tensors, upstream = make_rows(rows, k), torch.randn(rows, device=DEVICE)
    stop_gradient, bucket = reverse_kl_options(partial(reverse_kl, **options))
    ours = kernels.reverse_kl(*tensors, upstream, stop_gradient, bucket)
    theirs = by_autograd(tensors, upstream, options, torch.float32)
    exact = by_autograd(tensors, upstream, options, torch.float64)
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert_no_worse(a, t, e)


def test_rows_of_weight_zero_infinite_losses_and_nan(kernels):
    values, tail, teacher, teacher_tail = make_rows(5, 4)
    teacher[0, 0] = -torch.inf  # the student's mass has no place in the teacher: infinite
    teacher[1, 2] = -torch.inf
    values[2, 0] = torch.nan
    upstream = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], device=DEVICE)
    tensors = (values, tail, teacher, teacher_tail)
    loss, dvalues, dtail = kernels.reverse_kl(*tensors, upstream, True, False)
    assert loss[0] == loss[1] == torch.inf
    assert loss[2].isnan()
    assert dvalues[2].isnan().all()
    assert dvalues[1].abs().max() == dtail[1] == 0
    assert dvalues[4].abs().max() == dtail[4] == 0
    assert loss[4].isfinite()


def test_which_objectives_are_the_kernels():
    assert reverse_kl_options(reverse_kl) == (True, False)
    assert reverse_kl_options(partial(reverse_kl, stop_gradient=False)) == (False, False)
    assert reverse_kl_options(partial(reverse_kl, tail="bucket")) == (True, True)
    for other in (
        jsd,
        partial(reverse_kl, tail="renormalize"),
        partial(reverse_kl, tail="other"),
        lambda s, t: reverse_kl(s, t),
        partial(lambda s, t: reverse_kl(s, t)),
    ):
        assert reverse_kl_options(other) is None


@pytest.mark.parametrize("support", ["student", "teacher", "intersection"])
@pytest.mark.parametrize("options", OPTIONS)
def test_one_pass_uses_it_where_student_is_what_was_selected(
    monkeypatch, kernels, options, support
):
    calls = []

    def counted(*args):
        calls.append(args)
        return launched(*args)

    launched = kernels.reverse_kl
    monkeypatch.setattr(kernels, "reverse_kl", counted)
    student, teacher = (make_logits(dtype=torch.float32) for _ in range(2))
    objective = partial(reverse_kl, **options)
    run = partial(distillation_loss, student, teacher, k=4, support=support, method="one_pass")
    weights = torch.rand(student.hidden.shape[0], device=DEVICE)
    weights[2] = 0.0
    arguments = {"backend": "triton", "token_weights": weights, "compact": False}
    ours = run(objective=objective, **arguments)
    assert bool(calls) == (support != "intersection")  # there slots move to the tail
    theirs = run(objective=lambda s, t: objective(s, t), **arguments)
    torch.testing.assert_close(ours.per_token, theirs.per_token)
    operands = (student.hidden, student.weight, student.bias)
    for a, b in zip(
        torch.autograd.grad(ours.loss, operands), torch.autograd.grad(theirs.loss, operands),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)

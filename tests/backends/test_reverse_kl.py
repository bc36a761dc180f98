"""Each backend's reverse KL with its gradient against autograd through divergences.reverse_kl."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from opd_kernels import SparseLogits, distillation_loss, jsd, reverse_kl
from opd_kernels.backends import available_backends, reaches, select_backend
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.loss.objective import reverse_kl_options
from tests.device import DEVICE
from tests.epilogue_cases import assert_no_worse
from tests.reference import gradients, make_logits

OPTIONS = [
    {},
    {"stop_gradient": False},
    {"tail": "bucket"},
    {"tail": "bucket", "stop_gradient": False},
]
VOCAB = 2_000


@pytest.fixture(params=[name for name in available_backends() if name in ("torch", "triton")])
def kernels(request):
    """The definition, and the one backend that overrides it."""
    if not reaches(request.param, DEVICE):
        pytest.skip(f"{request.param} does not reach tensors on {DEVICE}")
    return select_backend(request.param, DEVICE)


def make_rows(rows, k):
    """Return values and tails of both models, with an empty slot and a row whose tail is -inf."""
    values, teacher = (4 * torch.randn(rows, k, device=DEVICE) for _ in range(2))
    tails = torch.randn(2, rows, device=DEVICE)
    if k > 2:
        values[:, 1] = teacher[:, 1] = -torch.inf
    tails[:, rows // 2] = -torch.inf
    return values, tails[0], teacher, tails[1]


def by_autograd(tensors, options, dtype):
    values, tail, teacher, teacher_tail = (t.to(dtype) for t in tensors)
    values.requires_grad_()
    tail.requires_grad_()
    ids = torch.arange(values.shape[1], device=DEVICE).expand(values.shape)
    s = SparseLogits(values, ids, tail, VOCAB)
    loss = reverse_kl(s, SparseLogits(teacher, ids, teacher_tail, VOCAB), **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (values, tail))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 3), (70, 20), (3, 1024)])
def test_loss_and_gradient(kernels, options, rows, k):
    tensors = make_rows(rows, k)
    stop_gradient, bucket = reverse_kl_options(partial(reverse_kl, **options))
    ours = kernels.reverse_kl(*tensors, stop_gradient=stop_gradient, bucket=bucket)
    theirs = by_autograd(tensors, options, torch.float32)
    exact = by_autograd(tensors, options, torch.float64)
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert_no_worse(a, t, e)


def test_infinite_losses_and_nan(kernels):
    values, tail, teacher, teacher_tail = make_rows(5, 4)
    teacher[0, 0] = -torch.inf  # the student has mass where the teacher has none
    values[2, 0] = torch.nan
    models = (values, tail, teacher, teacher_tail)
    loss, dvalues, _ = kernels.reverse_kl(*models, stop_gradient=True, bucket=False)
    assert loss[0] == torch.inf
    assert loss[2].isnan()
    assert dvalues[2].isnan().all()
    assert loss[[1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_an_infinite_loss_of_weight_zero_gets_no_gradient(kernels, method):
    logits = make_logits(dtype=torch.float32, softcap=None)
    student, teacher = logits, make_logits(dtype=torch.float32, softcap=None, requires_grad=False)
    hidden = teacher.hidden.clone()
    hidden[2] = 1e30  # one token has all of the teacher's mass
    teacher = replace(teacher, hidden=hidden)
    weights = torch.ones(hidden.shape[0])
    weights[2] = 0.0
    name = "torch" if type(kernels) is Epilogues else "triton"
    options = {"k": 4, "backend": name, "method": method, "compact": False}
    out = distillation_loss(student, teacher, token_weights=weights, **options)
    for gradient in torch.autograd.grad(out.loss, (student.hidden, student.weight)):
        assert gradient.isfinite().all()


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


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "teacher", "intersection"])
@pytest.mark.parametrize("options", OPTIONS)
def test_distillation_loss_uses_it(monkeypatch, kernels, options, support, method):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return launched(*args, **options)

    launched = kernels.reverse_kl
    monkeypatch.setattr(kernels, "reverse_kl", counted)
    name = "torch" if type(kernels) is Epilogues else "triton"
    student, teacher = (make_logits(tokens=5, dtype=torch.float32) for _ in range(2))
    objective = partial(reverse_kl, **options)
    weights = torch.rand(5)
    weights[2] = 0.0
    run = partial(
        distillation_loss, student, teacher, k=4, support=support, method=method,
        backend=name, token_weights=weights, compact=False,
    )  # fmt: skip
    ours = run(objective=objective)
    assert len(calls) == 1
    theirs = run(objective=lambda s, t: objective(s, t))
    assert len(calls) == 1
    torch.testing.assert_close(ours.per_token, theirs.per_token)
    for a, b in zip(gradients(ours.loss, student), gradients(theirs.loss, student), strict=True):
        torch.testing.assert_close(a, b)


def test_nan_of_the_teacher_stays_nan_where_the_student_has_no_mass(kernels):
    values, tail, teacher, teacher_tail = make_rows(3, 4)
    values[0], tail[0] = -1e4, 0.0  # all mass is outside S
    teacher[0], teacher_tail[0] = torch.nan, torch.nan
    for bucket in (False, True):
        models = (values, tail, teacher, teacher_tail)
        loss, _, _ = kernels.reverse_kl(*models, stop_gradient=True, bucket=bucket)
        assert loss[0].isnan()
        assert loss[1:].isfinite().all()

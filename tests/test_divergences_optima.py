"""Minima of the objectives: closed forms, and the paper's collapse on a small example."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, distillation_loss, forward_kl, jsd, reverse_kl
from tests.device import DEVICE
from tests.reference import eager_sparse as sparse


def minimise(objective, zt, ids, steps=1500):
    z = torch.zeros_like(zt, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=0.05)
    teacher = sparse(zt, ids)
    for _ in range(steps):
        optimiser.zero_grad()
        objective(sparse(z, ids), teacher).sum().backward()
        optimiser.step()
    return z.detach().softmax(-1)


def test_closed_forms_of_the_optimum_on_a_fixed_support():
    """Without stop-gradient the optimum is p = q / e on S, so P = Q / e; with it p = q on S."""
    zt = torch.randn(2, 12, dtype=torch.float64)
    ids = zt.topk(4).indices
    q = zt.softmax(-1).gather(-1, ids)
    biased = minimise(partial(reverse_kl, stop_gradient=False), zt, ids).gather(-1, ids)
    assert_close(biased, q / torch.e, rtol=1e-4, atol=1e-6)
    unbiased = minimise(reverse_kl, zt, ids).gather(-1, ids)
    assert_close(unbiased, q, rtol=1e-4, atol=1e-6)


def descend(teacher, **options):
    """Return the student [R, V] after gradient descent that selects S anew in each step.

    The teacher is [R, V] logits; the student starts near it, and its rows are those of a head of
    size R with one-hot hidden states.
    """
    rows = len(teacher)
    one_hot = torch.eye(rows, dtype=torch.float64)
    z = (teacher.T + 0.7 * torch.randn(teacher.T.shape, dtype=torch.float64)).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 400)
    for _ in range(400):
        adam.zero_grad()
        student, other = LazyLogits(one_hot, z), LazyLogits(one_hot, teacher.T)
        output = distillation_loss(student, other, reduction="sum", **options)
        output.loss.backward()
        adam.step()
        schedule.step()
    live = output.student.values > -torch.inf
    return z.detach().T.softmax(-1), output.student.ids.masked_fill(~live, -1)


# The table of optima in docs/objectives.md: what the student is on S, as a function of p and q.
ENDS = {
    "drop": lambda p, q: (p, q),
    "bucket": lambda p, q: (p, q),
    "renormalize": lambda p, q: (p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("tail", list(ENDS))
@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, partial(jsd, beta=0.3)])
def test_each_objective_ends_where_the_student_equals_the_teacher_on_the_support(
    objective, tail, support
):
    """With a teacher whose top 5 of 50 hold half to four fifths of the mass."""
    torch.manual_seed(0)
    teacher = 1.9 * torch.randn(4, 50, dtype=torch.float64)
    p, ids = descend(teacher, k=5, support=support, objective=partial(objective, tail=tail))
    q, live = teacher.softmax(-1), ids >= 0
    assert (live.sum(-1) > 1).all()
    on_support = [x.gather(-1, ids.clamp_min(0)) * live for x in (p, q)]
    assert 0.3 < on_support[1].sum(-1).min() < 0.6
    assert_close(*ENDS[tail](*on_support), rtol=1e-6, atol=1e-8)
    if tail != "renormalize":  # the support holds the teacher's mass, neither all nor nothing
        assert_close(on_support[0].sum(-1), on_support[1].sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, jsd])
def test_over_the_whole_vocabulary_each_objective_ends_at_the_teacher(objective):
    torch.manual_seed(0)
    teacher = 1.9 * torch.randn(4, 50, dtype=torch.float64)
    p, _ = descend(teacher, support="full", objective=objective)
    assert_close(p, teacher.softmax(-1), rtol=1e-4, atol=1e-8)


def test_closed_forms_of_self_distillation_over_several_teachers():
    """The mean reverse KL is minimal at the normalised geometric mean of the teachers, where it is
    -log Z; the mean forward KL at their arithmetic mean.
    """
    teachers = torch.randn(3, 9, dtype=torch.float64)
    whole = torch.arange(9)[None]

    def average(objective):
        def loss(s, _):
            return torch.stack([objective(s, sparse(t[None], whole)) for t in teachers]).mean(0)

        return loss

    log_q = teachers.log_softmax(-1)
    geometric = log_q.mean(0).exp()
    p = minimise(average(reverse_kl), teachers[:1], whole)
    assert_close(p[0], geometric / geometric.sum(), rtol=1e-4, atol=1e-6)
    residual = average(reverse_kl)(sparse(p.log(), whole), None)
    assert_close(residual[0], -geometric.sum().log(), rtol=1e-6, atol=1e-8)
    p = minimise(average(forward_kl), teachers[:1], whole)
    assert_close(p[0], log_q.exp().mean(0), rtol=1e-4, atol=1e-6)


def test_stop_gradient_keeps_the_mass_on_the_support_where_its_absence_loses_it():
    """Gradient descent on one row that selects S again in every step."""

    def final_mass(stop_gradient):
        generator = torch.Generator(DEVICE).manual_seed(3)
        zt = 2.5 * torch.randn(50, generator=generator, dtype=torch.float64)
        z = (zt + 0.7 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
        masses = []
        for _ in range(600):
            ids = z.detach().topk(5).indices
            s = sparse(z, ids)
            masses.append(float(s.mass.detach()))
            loss = reverse_kl(s, sparse(zt, ids), stop_gradient=stop_gradient)
            z.data -= torch.autograd.grad(loss, z)[0]
        return masses[0], masses[-1]

    start, with_stop = final_mass(True)
    _, without = final_mass(False)
    assert without < 0.6 * start
    assert with_stop > 0.9 * start

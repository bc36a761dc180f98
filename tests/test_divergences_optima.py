"""Minima of the objectives: closed forms, and the paper's collapse on a small example."""

from functools import partial

import torch
from torch.testing import assert_close

from opd_kernels import forward_kl, reverse_kl
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

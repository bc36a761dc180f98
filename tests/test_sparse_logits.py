"""Properties and methods of SparseLogits, compared with full logits."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import SparseLogits, forward_kl, reverse_kl
from tests.reference import full_logits, make_logits, outside_lse


def test_lse_log_probs_mass_and_tail():
    logits = make_logits()
    log_p = full_logits(logits).log_softmax(-1)
    s = logits.topk(5)
    on_support = log_p.gather(-1, s.ids)
    assert_close(s.log_probs, on_support, rtol=1e-12, atol=1e-13)
    assert_close(s.mass, on_support.exp().sum(-1), rtol=1e-12, atol=1e-13)
    assert_close(s.log_tail, outside_lse(log_p, s.ids), rtol=1e-12, atol=1e-13)


def test_overlap_counts_shared_live_ids():
    a, b = make_logits(), make_logits()
    s, t = a.topk(8), b.topk(8)
    expected = [
        len(set(x) & set(y)) / 8 for x, y in zip(s.ids.tolist(), t.ids.tolist(), strict=True)
    ]
    assert_close(s.overlap(t), torch.tensor(expected))
    mask = torch.zeros_like(s.ids, dtype=torch.bool)
    mask[:, :4] = True
    fewer = [
        len(set(x[:4]) & set(y)) / 4 for x, y in zip(s.ids.tolist(), t.ids.tolist(), strict=True)
    ]
    assert_close(s.keep(mask).overlap(t), torch.tensor(fewer))


def test_keep_moves_slots_into_the_tail():
    logits = make_logits()
    z, s = full_logits(logits), logits.topk(6)
    mask = torch.arange(6) % 2 == 0
    kept = s.keep(mask.expand(s.ids.shape))
    expected = outside_lse(z, s.ids[:, mask])
    assert_close(kept.tail, expected, rtol=1e-12, atol=1e-13)
    assert_close(kept.lse, z.logsumexp(-1), rtol=1e-12, atol=1e-13)
    actual = torch.autograd.grad(kept.tail.sum(), logits.hidden)[0]
    assert_close(
        actual, torch.autograd.grad(expected.sum(), logits.hidden)[0], rtol=1e-10, atol=1e-14
    )


def test_at_looks_ids_up():
    logits = make_logits()
    z, t = full_logits(logits), logits.topk(6)
    ids = torch.stack([row[torch.randperm(6)][:4] for row in t.ids])
    ids[:, 3] = torch.stack(
        [row[-1] for row in z.sort(-1, descending=True).indices]
    )  # not in top 6
    ids[0, 1] = ids[0, 0]
    ids[1, 0] = -1
    found = t.at(ids)
    expected = z.gather(-1, ids.clamp_min(0))
    expected[:, 3] = expected[0, 1] = expected[1, 0] = -torch.inf
    assert_close(found.values, expected)
    live = ids.masked_fill(expected == -torch.inf, -1)
    assert_close(found.tail, outside_lse(z, live), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_topk_of_sparse_logits(k):
    logits = make_logits(requires_grad=False)
    given = logits.gather(logits.topk(7).ids.flip(-1))
    best = given.topk(k)
    expected = logits.topk(min(k, 7))
    order = best.values.argsort(-1, descending=True)
    assert torch.equal(best.ids.gather(-1, order), expected.ids)
    assert torch.equal(best.values.gather(-1, order), expected.values)
    assert_close(best.tail, expected.tail, rtol=1e-12, atol=1e-13)


def test_keep_everything_of_a_whole_row_has_a_finite_gradient():
    logits = make_logits(tokens=2, vocab=6)
    s = logits.topk(6)
    kept = s.keep(torch.ones_like(s.ids, dtype=torch.bool))
    assert torch.equal(kept.tail, torch.full((2,), -torch.inf, dtype=torch.float64))
    dhidden = torch.autograd.grad(kept.lse.sum(), logits.hidden)[0]
    expected = torch.autograd.grad(full_logits(logits).logsumexp(-1).sum(), logits.hidden)[0]
    assert_close(dhidden, expected, rtol=1e-10, atol=1e-14)


def test_from_log_probs_of_a_server():
    logits = make_logits(requires_grad=False)
    log_p = full_logits(logits).log_softmax(-1)
    best = log_p.topk(7)
    t = SparseLogits.from_log_probs(best.values, best.indices, vocab_size=53)
    assert_close(t.log_probs, best.values, rtol=1e-12, atol=1e-12)
    assert_close(t.lse, torch.zeros(11, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(t.log_tail, outside_lse(log_p, best.indices), rtol=1e-9, atol=1e-12)
    ids = best.indices.clone()
    ids[:, 1] = ids[:, 0]  # servers send the sampled token twice
    ids[:, 2] = 99
    t = SparseLogits.from_log_probs(best.values, ids, vocab_size=53)
    assert (t.values[:, 1:3] == -torch.inf).all()


def test_from_log_probs_of_the_whole_vocabulary_has_no_tail():
    log_p, log_q = torch.randn(2, 3, 6, dtype=torch.float64).log_softmax(-1)
    ids = torch.arange(6).expand(3, 6)
    s, t = (SparseLogits.from_log_probs(x, ids, vocab_size=6) for x in (log_p, log_q))
    assert (t.tail == -torch.inf).all()
    expected = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert_close(forward_kl(s, t, tail="bucket"), expected, rtol=1e-12, atol=1e-14)


def test_from_log_probs_guards_the_tail():
    """A row whose float32 mass is 1 or slightly above gets a finite tail without gradient."""
    log_p = torch.tensor([[0.0, -40.0], [1e-7, -30.0]], requires_grad=True)
    ids = torch.tensor([[3, 4], [3, 4]])
    s = SparseLogits.from_log_probs(log_p, ids, vocab_size=10)
    assert_close(s.tail, torch.full((2,), -24 * torch.log(torch.tensor(2.0)).item()))
    assert not s.tail.requires_grad
    loss = reverse_kl(s, s, tail="bucket").sum()
    assert torch.isfinite(torch.autograd.grad(loss, log_p)[0]).all()


def test_from_log_probs_refuses_what_is_no_distribution():
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="sum to at most 1, got 2"):
        SparseLogits.from_log_probs(torch.zeros(1, 2), ids, vocab_size=5)
    with pytest.raises(ValueError, match="sum to at most 1, got nan"):
        SparseLogits.from_log_probs(torch.full((1, 2), torch.nan), ids, vocab_size=5)
    with pytest.raises(TypeError, match=r"ids: expected an integer tensor, got torch\.float32"):
        SparseLogits.from_log_probs(torch.zeros(1, 2), ids.float(), vocab_size=5)
    with pytest.raises(
        ValueError, match=r"ids: expected the shape of the values, \(1, 3\), got \(1, 2\)"
    ):
        SparseLogits.from_log_probs(torch.full((1, 3), -2.0), ids, vocab_size=5)


def test_without_a_tail_what_needs_it_says_so():
    s = make_logits().gather(torch.tensor([[1, 2]] * 11), tail=False)
    for name in ("lse", "log_probs", "log_tail", "mass"):
        with pytest.raises(ValueError, match="gather with tail=True"):
            getattr(s, name)
    assert reverse_kl(s, s.detach(), tail="renormalize").abs().max() == 0


def test_derived_sparse_logits_are_checked_like_others():
    """The package skips the checks for what it derives; a caller's changes are checked."""
    derived = make_logits(requires_grad=False).topk(3)
    for sparse in (derived, derived.detach(), derived.at(derived.ids), derived.topk(2)):
        assert type(sparse) is SparseLogits
        with pytest.raises(ValueError, match="ids: expected the shape of the values"):
            replace(sparse, values=torch.zeros(2, 9))
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            replace(sparse, temperature=-1.0)

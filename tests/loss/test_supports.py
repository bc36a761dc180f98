"""A served teacher, which has values only at its own ids."""

from functools import partial

import pytest
import torch

from opd_kernels import distillation_loss
from tests.distill_cases import OBJECTIVES, K, assert_same, eager_per_token, pair, served
from tests.reference import eager_sparse, full_logits, gradients, sorted_by_logit


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_served_teacher(method):
    student, teacher = pair()
    zt = full_logits(teacher)
    answer = served(teacher, 9)
    run = partial(distillation_loss, student, answer, method=method, objective=OBJECTIVES["bucket"])

    def expect(out, ids):
        expected = eager_per_token(OBJECTIVES["bucket"], student, teacher, ids).mean()
        assert_same(
            [out.loss, *gradients(out.loss, student)],
            [expected, *gradients(expected, student)], rtol=1e-7, atol=1e-7,
        )  # fmt: skip

    ours, theirs = sorted_by_logit(full_logits(student), K), sorted_by_logit(zt, 9)
    expect(run(k=4, support="teacher"), theirs[:, :4])
    expect(run(k=9, support="teacher"), theirs)
    has_value = (ours[..., :, None] == theirs[..., None, :]).any(-1)
    assert not has_value.all()
    expect(run(k=K, missing="drop"), ours.masked_fill(~has_value, -1))
    inside = (ours[..., :, None] == theirs[:, None, :K]).any(-1)
    expect(run(k=K, support="intersection"), ours.masked_fill(~inside, -1))
    expect(run(support=theirs[:, 2:6]), theirs[:, 2:6])
    absent = int((~has_value).sum())
    with pytest.raises(
        ValueError, match=f"no value for {absent} of the support's {ours.numel()} slots"
    ):
        run(k=K)


def test_missing_drop_is_the_papers_fill_under_stop_gradient():
    """The paper fills a missing slot with the student's log-prob, so that c = 0. Dropping the slot
    has the same gradient.
    """
    student, teacher = pair()
    answer = served(teacher, 9)
    z, zt = full_logits(student), full_logits(teacher)
    ids = sorted_by_logit(z, K)
    s, t = eager_sparse(z, ids), eager_sparse(zt, ids)
    has_value = (ids[..., :, None] == answer.ids[..., None, :]).any(-1)
    log_q = torch.where(has_value, t.log_probs, s.log_probs.detach())
    filled = (s.log_probs.exp() * (s.log_probs.detach() - log_q)).sum(-1).mean()
    out = distillation_loss(student, answer, k=K, missing="drop")
    assert_same(gradients(out.loss, student), gradients(filled, student), rtol=1e-7, atol=1e-8)

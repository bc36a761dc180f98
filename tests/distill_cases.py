"""Students, teachers, supports and objectives for tests of distillation_loss."""

from functools import partial

import torch
from torch.testing import assert_close

from opd_kernels import (
    SparseLogits,
    distillation_loss,
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
)
from tests.reference import eager_sparse, full_logits, make_logits, sorted_by_logit

VOCAB, K, TOKENS = 53, 5, 11


OBJECTIVES = {
    "reverse_kl": reverse_kl,
    "biased": partial(reverse_kl, stop_gradient=False),
    "bucket": partial(reverse_kl, tail="bucket"),
    "renormalize": partial(reverse_kl, tail="renormalize"),
    "forward_kl": forward_kl,
    "forward_bucket": partial(forward_kl, tail="bucket"),
    "jsd": partial(jsd, beta=0.3),
    "mixture": lambda s, t: reverse_kl(s, t) + 0.1 * forward_kl(s, t, tail="bucket").clamp_max(2.0),
}


SUPPORTS = ["student", "teacher", "union", "intersection", "full", "ids"]


METHODS = ["one_pass", "recompute"]


ORDERS = [
    {"method": "one_pass"},
    {"method": "one_pass", "chunk_bytes": VOCAB * 8 * 3},
    {"method": "recompute"},
    {"method": "recompute", "chunk_bytes": VOCAB * 8 * 2},
]


def pair(tokens=TOKENS, **options):
    """Return a student with all head options, and a teacher of another hidden size and padding."""
    student = make_logits(tokens=tokens, vocab=VOCAB, **options)
    teacher = make_logits(
        tokens=tokens, dim=9, vocab=VOCAB, padded=9, softcap=None, requires_grad=False,
        temperature=student.temperature,
    )  # fmt: skip
    return student, teacher


def support_ids(support, z, zt, k=K):
    """Return the ids of a support, computed from full logits; -1 in empty slots."""
    ours, theirs = sorted_by_logit(z, k), sorted_by_logit(zt, k)
    if support == "student":
        return ours
    if support == "teacher":
        return theirs
    if support == "full":
        return torch.arange(z.shape[-1]).expand(z.shape)
    shared = (ours[..., :, None] == theirs[..., None, :]).any(-1)
    if support == "intersection":
        return ours.masked_fill(~shared, -1)
    repeated = (theirs[..., :, None] == ours[..., None, :]).any(-1)
    return torch.cat([ours, theirs.masked_fill(repeated, -1)], dim=-1)


def eager_per_token(objective, student, teacher, ids):
    z, zt = full_logits(student), full_logits(teacher)
    return objective(eager_sparse(z, ids), eager_sparse(zt, ids))


def assert_same(actual, expected, rtol=1e-12, atol=1e-13):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rtol=rtol, atol=atol)


def served(teacher, k):
    """Return the teacher as a server would: log-probabilities of its own top K."""
    t = teacher.topk(k)
    return SparseLogits.from_log_probs(
        t.log_probs, t.ids, vocab_size=VOCAB, temperature=teacher.temperature
    )


def objectives_for(support):
    """Return name: (objective, K) of the objectives that apply to a support."""
    on_k = {name: (objective, K) for name, objective in OBJECTIVES.items() if name != "mixture"}
    one = {} if support in ("union", "full") else {"policy_gradient": (policy_gradient, 1)}
    return on_k | one


def ids_of(tokens, k):
    """Return ids [tokens, k] that are distinct in each row."""
    return torch.arange(tokens)[:, None] + 7 * torch.arange(k)


def summed_loss(student, teacher, support, k, **options):
    """Return distillation_loss with reduction="sum"; support="ids" means ids_of."""
    ids = ids_of(student.hidden.shape[0], k) if support == "ids" else support
    return distillation_loss(student, teacher, k=k, support=ids, reduction="sum", **options)

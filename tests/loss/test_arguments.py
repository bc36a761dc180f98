"""Arguments that distillation_loss refuses in both orders; see also tests/bad_arguments.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import distillation_loss, reverse_kl
from tests.distill_cases import VOCAB, K, pair, served
from tests.reference import make_logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "avg"}, r"reduction: expected one of \('mean', 'sum', 'none'\), got 'avg'"),
        ({"missing": "fill"}, r"missing: expected one of \('error', 'drop'\), got 'fill'"),
        ({"support": "full", "k": None}, "k: expected an int, got NoneType"),
        ({"reduction": "none", "method": "one_pass"}, "use method='recompute' or 'auto'"),
        ({"denominator": torch.ones(11)}, r"denominator: expected one number, got shape \(11,\)"),
        ({"denominator": 4, "reduction": "sum"}, "denominator: it belongs to reduction='mean'"),
        ({"support": "full", "k": 0}, "k: expected 1 to 53, the vocabulary, got 0"),
        ({"objective": lambda s, t: s.ids.sum(-1)}, "a floating tensor of shape"),
        ({"token_weights": torch.ones(3)}, r"token_weights: expected the leading shape \(11,\)"),
        ({"k": 0}, "k: expected 1 to 53, the vocabulary, got 0"),
        ({"k": 54}, "k: expected 1 to 53, the vocabulary, got 54"),
        ({"objective": lambda s, t: reverse_kl(s, t).mean()}, "objective: expected a loss per row"),
        ({"objective": lambda s, t: 1.0}, "got float; do not reduce"),
        ({"backend": "cuda13"}, r"backend: expected 'auto' or one of .*, got 'cuda13'"),
        ({"chunk_bytes": 0}, "chunk_bytes: expected a positive number of bytes"),
        ({"support": torch.zeros(11, 2)}, r"ids: expected an integer tensor, got torch\.float32"),
        ({"support": torch.zeros(4, 2, dtype=torch.long)}, r"got \(4, 2\)"),
        ({"teacher": make_logits(tokens=4)}, r"leading shape \(11,\), got \(4,\)"),
        ({"teacher": make_logits(temperature=2.0)}, "temperature: expected the same"),
    ],
)
@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_bad_arguments(method, changes, message):
    student, teacher = pair()
    arguments = {"teacher": teacher, "k": K, "method": method} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        distillation_loss(student, **arguments)


def test_full_support_refuses_a_server():
    student, teacher = pair()
    with pytest.raises(ValueError, match="support: 'full' needs the teacher's whole distribution"):
        distillation_loss(student, served(teacher, 9), support="full")
    with pytest.raises(TypeError, match="student: expected LazyLogits, got Tensor"):
        distillation_loss(student.hidden, teacher)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_an_objective_without_gradient_is_refused_unless_it_only_measures(method, support):
    student, teacher = pair()
    run = partial(
        distillation_loss, student, teacher, k=K, support=support, method=method,
        objective=lambda s, t: reverse_kl(s.detach(), t),
    )  # fmt: skip
    with pytest.raises(ValueError, match="objective: its loss has no gradient with respect to"):
        run().loss.backward()
    with torch.no_grad():
        measured = run().loss
    assert_close(measured, run(objective=reverse_kl).loss.detach())


def test_a_servers_answer_must_be_well_formed():
    student, teacher = pair()
    answer = served(teacher, 9)
    for changes, message in (
        ({"ids": answer.ids.int()}, "teacher: expected int64 ids"),
        ({"ids": answer.ids.double()}, "ids: expected an integer tensor"),
        ({"ids": answer.ids[:, :4]}, r"ids: .* shape of the values, \(11, 9\), got \(11, 4\)"),
        ({"vocab_size": VOCAB + 1}, "vocab_size: expected the same value for student and teacher"),
        ({"temperature": 7.0}, "temperature: expected the same value for student and teacher"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            distillation_loss(
                student,
                replace(answer, **changes),
                support="teacher",
                objective=lambda s, t: (s.log_probs - t.log_probs).square().sum(-1),
            )

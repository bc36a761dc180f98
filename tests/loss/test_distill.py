"""distillation_loss in both orders, compared with full logits."""

import warnings
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import (
    LazyLogits,
    TopKDistillationLoss,
    distillation_loss,
    forward_kl,
    policy_gradient,
    reverse_kl,
)
from tests.device import DEVICE
from tests.distill_cases import (
    OBJECTIVES,
    ORDERS,
    SUPPORTS,
    TOKENS,
    VOCAB,
    K,
    assert_same,
    eager_per_token,
    pair,
    support_ids,
)
from tests.reference import (
    full_logits,
    gradients,
    in_float64,
    make_logits,
    outside_lse,
    rows_for,
    sorted_by_logit,
)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("support", SUPPORTS)
def test_both_orders_equal_full_logits(backend, objective, support):
    tokens = rows_for(backend, TOKENS)
    student, teacher = pair(tokens)
    weights = torch.rand(tokens, dtype=torch.float64)
    weights[3] = 0
    if support == "ids":
        support = torch.randint(-2, VOCAB + 3, (tokens, 6))
        ids = support.clone()
        for row in ids:  # repeated ids and ids outside the vocabulary are empty slots
            for slot in range(6):
                if row[slot] in row[:slot] or row[slot] >= VOCAB:
                    row[slot] = -1
        ids.clamp_min_(-1)
    else:
        ids = support_ids(support, full_logits(student).detach(), full_logits(teacher))
    per_token = eager_per_token(objective, student, teacher, ids)
    expected_loss = (per_token * weights).sum() / weights.sum()
    expected = [expected_loss, *gradients(expected_loss, student)]
    for order in ORDERS:
        out = distillation_loss(
            student, teacher, k=K, support=support, objective=objective, token_weights=weights,
            backend=backend, **order,
        )  # fmt: skip
        assert_same([out.loss, *gradients(out.loss, student)], expected)
        assert_close(
            out.per_token, per_token.detach().masked_fill(weights == 0, 0.0), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("order", ORDERS)
def test_output_holds_both_models_on_the_support(backend, order):
    student, teacher = pair()
    z, zt = full_logits(student).detach(), full_logits(teacher)
    for support in ("student", "full"):
        out = distillation_loss(
            student, teacher, k=K, support=support, entropy=True, backend=backend, **order
        )
        ids = sorted_by_logit(z, K)
        for sparse, logits in ((out.student, z), (out.teacher, zt)):
            assert torch.equal(sparse.ids, ids)
            assert_close(sparse.values, logits.gather(-1, ids), rtol=1e-12, atol=1e-13)
            assert_close(sparse.tail, outside_lse(logits, ids), rtol=1e-12, atol=1e-13)
            expected = torch.distributions.Categorical(logits=logits).entropy()
            assert_close(sparse.entropy, expected, rtol=1e-12, atol=1e-13)
            assert not sparse.values.requires_grad
        assert not out.per_token.requires_grad


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_reductions_and_denominators(method):
    student, teacher = pair()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    run = partial(distillation_loss, student, teacher, k=K, method=method)
    per_token = run().per_token
    assert_close(run().loss, per_token.mean())
    assert_close(run(token_weights=weights).loss, (per_token * weights).sum() / weights.sum())
    assert_close(run(token_weights=weights, reduction="sum").loss, (per_token * weights).sum())
    for denominator in (7.0, torch.tensor(7)):
        out = run(token_weights=weights, denominator=denominator)
        assert_close(out.loss, (per_token * weights).sum() / 7)
        whole = run(token_weights=weights, reduction="sum")
        scaled = [g / 7 for g in gradients(whole.loss, student)]
        assert_same(gradients(out.loss, student), scaled)
    out = run(token_weights=torch.zeros(TOKENS))
    assert out.loss == 0
    assert all((g == 0).all() for g in gradients(out.loss, student))
    out = distillation_loss(student[:0], teacher[:0], k=K, method=method)
    assert out.loss == 0
    assert all((g == 0).all() for g in gradients(out.loss, student[:0]))


def test_reduction_none_weighs_later():
    student, teacher = pair()
    later = torch.randn(TOKENS, dtype=torch.float64)
    for support in ("student", "full"):
        out = distillation_loss(student, teacher, k=K, support=support, reduction="none")
        ids = support_ids(support, full_logits(student).detach(), full_logits(teacher))
        expected = (eager_per_token(reverse_kl, student, teacher, ids) * later).sum()
        assert_same(gradients((out.loss * later).sum(), student), gradients(expected, student))


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_micro_batches_with_a_global_denominator_add_up(method):
    student, teacher = pair()
    whole = distillation_loss(student, teacher, k=K, method=method).loss
    parts = [
        distillation_loss(student[rows], teacher[rows], k=K, method=method, denominator=TOKENS).loss
        for rows in (slice(0, 4), slice(4, 11))
    ]
    assert_close(sum(parts), whole)
    assert_same(gradients(sum(parts), student), gradients(whole, student))


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_padded_vocabularies_are_cut_to_the_smaller(method, support):
    """Student V = 151,936 and teacher V = 152,064 give the loss of heads cut to 151,936 rows."""
    small, large = 151_936, 152_064
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(small, 4, requires_grad=True)
    t_hidden, t_weight = torch.randn(2, 3), torch.randn(large, 3)
    t_weight[small:] = 9.0  # the padding would dominate the loss
    student = LazyLogits(hidden, weight)
    run = partial(distillation_loss, student, k=20, method=method, support=support)
    padded = run(LazyLogits(t_hidden, t_weight))
    cut = run(LazyLogits(t_hidden, t_weight[:small].clone()))
    assert torch.equal(padded.loss, cut.loss)
    assert_same(gradients(padded.loss, student), gradients(cut.loss, student), rtol=0, atol=0)
    other = LazyLogits(hidden, torch.cat([weight, torch.full((64, 4), 9.0)]))
    student_padded = distillation_loss(
        other, LazyLogits(t_hidden, t_weight[:small]), k=20, method=method, support=support
    )
    assert torch.equal(student_padded.loss, cut.loss)


@pytest.mark.parametrize(
    ("student", "teacher", "vocab_size", "is_cut"),
    [
        (97, 104, None, False),
        (128, 97, None, False),
        (97, 103, None, True),  # no multiple of 8
        (1282, 1519, None, True),
        (1519, 1282, None, True),
        (1282, 1519, 1282, False),
        (64, 64 + 1024, None, True),
        (97, 97, None, False),
    ],
)
def test_a_vocabulary_that_is_no_padded_one_warns(student, teacher, vocab_size, is_cut):
    student = LazyLogits(torch.randn(2, 4), torch.randn(student, 4))
    teacher = LazyLogits(torch.randn(2, 4), torch.randn(teacher, 4), vocab_size=vocab_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distillation_loss(student, teacher, k=3)
    sizes = student.vocab_size, teacher.vocab_size
    expected = (
        f"teacher: expected the student's vocabulary of {sizes[0]} tokens, or a padded one, got "
        f"{sizes[1]}; the loss leaves out the ids from {min(sizes)}. Pass vocab_size={min(sizes)}"
    )
    assert [str(x.message)[: len(expected)] for x in caught] == [expected] * is_cut
    assert all(x.filename == __file__ for x in caught)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize(
    "frozen", [("weight", "bias"), ("hidden", "bias"), ("hidden", "weight", "bias")]
)
def test_frozen_operands_get_no_gradient(method, frozen):
    student, teacher = pair()
    run = partial(distillation_loss, student, teacher, k=K, method=method, objective=forward_kl)
    names = ("hidden", "weight", "bias")
    loss = run().loss
    everything = dict(zip(names, gradients(loss, student), strict=True))
    for name in frozen:
        getattr(student, name).requires_grad_(False)
    out = run()
    assert torch.equal(out.loss.detach(), loss.detach())
    assert out.loss.requires_grad == (len(frozen) < 3)
    trained = [name for name in names if name not in frozen]
    if trained:
        grads = torch.autograd.grad(out.loss, [getattr(student, name) for name in trained])
        assert_same(grads, [everything[name] for name in trained])


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_no_grad_computes_no_gradient(method, monkeypatch):
    student, teacher = pair()
    expected = distillation_loss(student, teacher, k=K, method=method).loss.detach()

    def refuse(*args):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("opd_kernels.loss.gradients.GradientSums.zeros", refuse)
    with torch.no_grad():
        out = distillation_loss(student, teacher, k=K, method=method)
    assert torch.equal(out.loss, expected)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_backward_twice(method, support):
    student, teacher = pair()
    out = distillation_loss(student, teacher, k=K, method=method, support=support)
    first = torch.autograd.grad(3 * out.loss, student.hidden, retain_graph=True)[0]
    assert first.abs().max() > 0
    if method == "one_pass":
        with pytest.raises(RuntimeError, match="use method='recompute'"):
            out.loss.backward()
    else:
        assert_close(3 * torch.autograd.grad(out.loss, student.hidden)[0], first)
    out = distillation_loss(student, teacher, k=K, method=method, support=support)
    (dhidden,) = torch.autograd.grad(out.loss, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        dhidden.sum().backward()


def test_a_failed_backward_of_one_pass_cannot_be_called_again(monkeypatch):
    """Some sums may already be scaled, so a second call would return wrong gradients."""
    student, teacher = pair()
    out = distillation_loss(student, teacher, k=K, method="one_pass")
    with monkeypatch.context() as patch:

        def refuse(*args):
            raise MemoryError("out of memory")

        patch.setattr("opd_kernels.linear.pages.PagedTensor.rounded", refuse)
        with pytest.raises(MemoryError):
            torch.autograd.grad(out.loss, student.hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by an earlier backward"):
        out.loss.backward()
    assert student.hidden.grad is None


def test_policy_gradient_on_sampled_ids():
    student, teacher = pair()
    ids = torch.randint(0, VOCAB, (TOKENS, 1))
    expected = eager_per_token(policy_gradient, student, teacher, ids).mean()
    expected = [expected, *gradients(expected, student)]
    for method in ("one_pass", "recompute"):
        out = distillation_loss(
            student, teacher, support=ids, objective=policy_gradient, method=method
        )
        assert_same([out.loss, *gradients(out.loss, student)], expected)


def test_autocast_is_left_before_the_walk():
    student, teacher = (
        LazyLogits(torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True))
        for _ in range(2)
    )
    cast = [LazyLogits(x.hidden.bfloat16(), x.weight.bfloat16()) for x in (student, teacher)]
    for method in ("one_pass", "recompute"):
        for support in ("student", "full"):
            run = partial(distillation_loss, k=4, method=method, support=support)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                out = run(student, teacher)
            expected = run(*cast)
            assert torch.equal(out.loss, expected.loss)
            ours, theirs = gradients(out.loss, student), gradients(expected.loss, student)
            assert_same(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_same_dtype_pytorch(dtype, method, support):
    student = make_logits(tokens=48, dim=64, vocab=900, dtype=dtype)
    teacher = make_logits(tokens=48, dim=64, vocab=900, dtype=dtype, requires_grad=False)
    ids = sorted_by_logit(full_logits(student).detach(), 20)
    if support == "full":
        ids = torch.arange(900).expand(48, 900)
    out = distillation_loss(
        student, teacher, support=support if support == "full" else ids, method=method
    )
    ours = [out.per_token, *gradients(out.loss, student)]

    def eager(logits, compute_dtype):
        z, zt = full_logits(logits, compute_dtype), full_logits(teacher, compute_dtype)
        if support == "full":
            log_p, log_q = z.log_softmax(-1), zt.log_softmax(-1)
        else:
            log_p, log_q = (x.gather(-1, ids) - x.logsumexp(-1, keepdim=True) for x in (z, zt))
        p, q = log_p.exp(), log_q.exp()
        loss = (p * (log_p - log_q) - p + q).sum(-1)
        return [loss, *gradients(loss.mean(), logits)]

    reference = eager(in_float64(student), torch.float64)
    results = list(zip(ours, eager(student, dtype), reference, strict=True))
    error, peer = ((x.double() - results[0][2]).square().mean().sqrt() for x in results[0][:2])
    assert error <= 2 * peer  # rms over tokens, as one number may be exact by luck
    for actual, same_dtype, expected in results[1:]:
        error = (actual.double() - expected).abs().max()
        peer = (same_dtype.double() - expected).abs().max()
        assert error <= 2 * peer + torch.finfo(torch.float32).eps * expected.abs().max()


def test_module_form():
    student, teacher = pair()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    module = TopKDistillationLoss(k=K, objective=forward_kl, support="union")
    expected = distillation_loss(
        student,
        teacher,
        k=K,
        objective=forward_kl,
        support="union",
        token_weights=weights,
        denominator=4,
    )
    assert torch.equal(module(student, teacher, weights, 4).loss, expected.loss)
    assert "k=5" in repr(module)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_a_counter_may_go_on_counting_before_backward(method):
    student, teacher = pair()
    run = partial(distillation_loss, student, teacher, k=K, method=method)
    expected = gradients(run(denominator=4).loss, student)
    counter = torch.tensor([4.0])
    loss = run(denominator=counter).loss
    counter.mul_(5)
    assert_same(gradients(loss, student), expected)


@pytest.mark.parametrize("which", ["student bias", "teacher weight"])
def test_operands_changed_before_a_recomputing_backward_raise(which):
    student, teacher = pair()
    loss = distillation_loss(student, teacher, support="full", method="recompute").loss
    with torch.no_grad():
        (student.bias if which == "student bias" else teacher.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_one_token_without_leading_dimensions(method, support):
    student, teacher = pair()
    run = partial(distillation_loss, k=K, method=method, support=support)
    out, expected = run(student[0], teacher[0]), run(student[:1], teacher[:1])
    assert out.per_token.shape == ()
    assert_close(out.loss, expected.loss)


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_an_objective_may_use_the_entropies(method, support):
    student, teacher = pair()
    out = distillation_loss(
        student, teacher, k=K, support=support, method=method, entropy=True,
        objective=lambda s, t: t.entropy * reverse_kl(s, t),
    )  # fmt: skip
    ids = support_ids(support, full_logits(student).detach(), full_logits(teacher))
    entropy = torch.distributions.Categorical(logits=full_logits(teacher)).entropy()
    expected = (entropy * eager_per_token(reverse_kl, student, teacher, ids)).mean()
    assert_close(out.loss, expected)
    assert_same(gradients(out.loss, student), gradients(expected, student))


def test_a_saturated_softcap_keeps_its_gradient_in_full():
    """At scores of 30 with a softcap of 5, 1 - tanh^2 of a rounded tanh would be mostly wrong."""
    student, teacher = pair(softcap=5.0, scale=12.0, dtype=torch.float32)
    run = partial(distillation_loss, support="full", reduction="sum")
    wide = in_float64(student)
    expected = gradients(run(wide, teacher).loss, wide)[1]
    actual = gradients(run(student, teacher).loss, student)[1].double()
    large = expected.abs() > 1e-6 * expected.abs().max()
    assert ((actual - expected) / expected)[large].abs().max() < 1e-3

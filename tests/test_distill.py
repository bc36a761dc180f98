"""distillation_loss in both orders against full logits."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opd_kernels import (
    LazyLogits,
    SparseLogits,
    TopKDistillationLoss,
    distillation_loss,
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
)
from tests.reference import (
    full_logits,
    gradients,
    in_float64,
    make_logits,
    outside_lse,
    sorted_by_logit,
)

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
ORDERS = [
    {"method": "one_pass"},
    {"method": "one_pass", "chunk_bytes": VOCAB * 8 * 3},
    {"method": "recompute"},
    {"method": "recompute", "chunk_bytes": VOCAB * 8 * 2},
]


def pair(**options):
    """A student with every option and a wider teacher with its own hidden size and padding."""
    student = make_logits(tokens=TOKENS, vocab=VOCAB, **options)
    teacher = make_logits(
        tokens=TOKENS, dim=9, vocab=VOCAB, padded=9, softcap=None, requires_grad=False,
        temperature=student.temperature,
    )  # fmt: skip
    return student, teacher


def support_ids(support, z, zt, k=K):
    """The ids of each support from full logits, -1 in slots that it leaves empty."""
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


def eager_sparse(z, ids):
    values = z.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    tail = outside_lse(z, ids)
    if ids.shape[-1] == z.shape[-1]:
        tail = torch.full_like(tail.detach(), -torch.inf)
    return SparseLogits(values, ids, tail, z.shape[-1])


def eager_per_token(objective, student, teacher, ids):
    z, zt = full_logits(student), full_logits(teacher)
    return objective(eager_sparse(z, ids), eager_sparse(zt, ids))


def assert_same(actual, expected, rtol=1e-12, atol=1e-13):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("support", SUPPORTS)
def test_both_orders_equal_full_logits(backend, objective, support):
    student, teacher = pair()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    weights[3] = 0
    if support == "ids":
        support = torch.randint(-2, VOCAB + 3, (TOKENS, 6))
        ids = support.clone()
        for row in ids:  # empty the repeats and what is out of range
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


def test_reduction_none_keeps_the_place_of_dropped_tokens():
    student, teacher = pair()
    weights = torch.ones(TOKENS)
    weights[[0, 4]] = 0
    out = distillation_loss(student, teacher, k=K, reduction="none", token_weights=weights)
    whole = distillation_loss(student, teacher, k=K, reduction="none")
    assert_close(out.loss, whole.loss.masked_fill(weights == 0, 0.0))
    assert (out.student.ids[[0, 4]] == -1).all()
    assert (out.student.mass[[0, 4]] == 0).all()


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
def test_dropped_tokens_may_hold_anything(method, support):
    """compact leaves weight 0 out before the first product, so NaN in padding does no harm."""
    student, teacher = pair()
    weights = torch.ones(TOKENS)
    weights[2] = 0
    kept = weights.bool()
    run = partial(distillation_loss, k=K, method=method, support=support)
    expected = run(student[kept], teacher[kept])
    hidden = student.hidden.detach().clone()
    hidden[2] = torch.nan
    hidden.requires_grad_()
    dirty = LazyLogits(hidden, student.weight, student.bias, 3.0, 0.7, 0.8, VOCAB)
    out = run(dirty, teacher, token_weights=weights)
    assert_close(out.loss, expected.loss)
    grads = gradients(out.loss, dirty)
    assert (grads[0][2] == 0).all()
    assert_same(grads[1:], gradients(expected.loss, student)[1:])
    loose = run(student, teacher, token_weights=weights, compact=False)
    assert_close(loose.loss, expected.loss)
    assert_same(gradients(loose.loss, student)[1:], grads[1:])


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_padded_vocabularies_are_cut_to_the_smaller(method, support):
    """Student V = 151,936 and teacher V = 152,064: as if both had been cut to 151,936."""
    small, large = 151_936, 152_064
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(small, 4, requires_grad=True)
    t_hidden, t_weight = torch.randn(2, 3), torch.randn(large, 3)
    t_weight[small:] = 9.0  # a leak of the padding would dominate
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

    monkeypatch.setattr("opd_kernels.gradients.Gradients.zeros", refuse)
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


def served(teacher, k):
    """What a server would answer: its own top-K log-probabilities."""
    t = teacher.topk(k)
    return SparseLogits.from_log_probs(
        t.log_probs, t.ids, vocab_size=VOCAB, temperature=teacher.temperature
    )


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
    """Filled with the student's own log-prob, a missing slot has c = 0; dropped, it does too."""
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


def test_autocast_is_left_before_the_walk():
    student, teacher = (
        LazyLogits(torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True))
        for _ in range(2)
    )
    cast = [LazyLogits(x.hidden.bfloat16(), x.weight.bfloat16()) for x in (student, teacher)]
    for method in ("one_pass", "recompute"):
        for support in ("student", "full"):
            run = partial(distillation_loss, k=4, method=method, support=support)
            with torch.autocast("cpu", dtype=torch.bfloat16):
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
    ours = [out.loss, *gradients(out.loss, student)]

    def eager(logits, compute_dtype):
        z, zt = full_logits(logits, compute_dtype), full_logits(teacher, compute_dtype)
        loss = reverse_kl(eager_sparse(z, ids), eager_sparse(zt, ids)).mean()
        return [loss, *gradients(loss, logits)]

    reference = eager(in_float64(student), torch.float64)
    for actual, same_dtype, expected in zip(ours, eager(student, dtype), reference, strict=True):
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


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().size() // 4)
        return out


@pytest.mark.parametrize("objective", ["reverse_kl", "renormalize", "bucket"])
@pytest.mark.parametrize("support", ["student", "union", "full"])
@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_nothing_of_size_tokens_times_vocabulary_is_ever_allocated(method, support, objective):
    tokens, dim, vocab = 512, 8, 20_000
    student, teacher = (
        LazyLogits(
            torch.randn(tokens, dim, requires_grad=True),
            torch.randn(vocab, dim, requires_grad=True),
        )
        for _ in range(2)
    )
    chunk_bytes = 64 * vocab * 4
    with LargestTensor() as largest:
        out = distillation_loss(
            student, teacher, k=8, support=support, method=method, chunk_bytes=chunk_bytes,
            objective=OBJECTIVES[objective],
        )  # fmt: skip
        out.loss.backward()
    assert largest.elements >= vocab * dim  # the recorder works
    assert largest.elements <= tokens * vocab // 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "avg"}, r"reduction: expected one of \('mean', 'sum', 'none'\), got 'avg'"),
        ({"method": "fast"}, "method: expected one of"),
        ({"missing": "fill"}, r"missing: expected one of \('error', 'drop'\), got 'fill'"),
        ({"support": "top"}, "support: expected one of"),
        ({"reduction": "none", "method": "one_pass"}, "use method='recompute' or 'auto'"),
        ({"token_weights": [1.0] * 11}, "token_weights: expected a real tensor"),
        ({"denominator": torch.ones(11)}, r"denominator: expected one number, got shape \(11,\)"),
        ({"denominator": "4"}, "denominator: expected a number or a tensor, got '4'"),
        ({"denominator": float("nan")}, "denominator: expected a number"),
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
        ({"teacher": torch.zeros(11, 53)}, "teacher: expected LazyLogits, or SparseLogits"),
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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.int64])
def test_weights_of_any_dtype_average_as_float32_ones_do(method, dtype):
    """Their own sum would round at 257 in bfloat16 and be inf past 65,504 in float16."""
    student, teacher = (
        LazyLogits(torch.randn(301, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True))
        for _ in range(2)
    )
    run = partial(distillation_loss, student, teacher, k=3, method=method)
    expected = run()
    for scale in (1, 30_000) if dtype == torch.float16 else (1,):
        out = run(token_weights=(scale * torch.ones(301)).to(dtype))
        assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
        assert_close(gradients(out.loss, student)[0], gradients(run().loss, student)[0])


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("support", ["student", "full", "union"])
@pytest.mark.parametrize("poison", ["student", "teacher", "infinite loss"])
def test_rows_of_weight_zero_do_no_harm_without_compact(method, support, poison):
    student, teacher = pair()
    weights = torch.rand(TOKENS, dtype=torch.float64)
    weights[2] = 0
    run = partial(distillation_loss, k=K, method=method, support=support, compact=False)
    expected = run(student, teacher, token_weights=weights)
    bias = teacher.bias.clone()
    hidden = [x.hidden.detach().clone() for x in (student, teacher)]
    if poison == "infinite loss":
        clash = full_logits(student)[2].argmax()
        bias[clash] = -torch.inf
        weights[[clash in row for row in student.topk(K).ids]] = 0
    else:
        hidden[poison == "teacher"][2] = torch.nan
    dirty = replace(student, hidden=hidden[0].requires_grad_())
    out = run(dirty, replace(teacher, hidden=hidden[1], bias=bias), token_weights=weights)
    grads = gradients(out.loss, dirty)
    assert (grads[0][weights == 0] == 0).all()
    if poison == "infinite loss":
        clean = support != "full"  # there q = 0 makes every row infinite
        assert torch.isfinite(out.loss) == clean
        assert all(torch.isfinite(g).all() for g in grads) or not clean
    else:
        assert_close(out.loss, expected.loss)
        assert_same(grads[1:], gradients(expected.loss, student)[1:])


def test_a_row_of_weight_zero_with_an_infinite_loss():
    student = LazyLogits(torch.eye(2), torch.eye(3)[:, :2].clone().requires_grad_())
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    teacher = LazyLogits(torch.zeros(2, 1), torch.zeros(3, 1), bias)
    ids, weights = torch.tensor([[2], [0]]), torch.tensor([0.0, 1.0])
    grads = [
        torch.autograd.grad(
            distillation_loss(
                student, teacher, support=ids, token_weights=weights, compact=compact, method=method
            ).loss,
            student.weight,
        )[0]
        for compact in (True, False)
        for method in ("one_pass", "recompute")
    ]
    assert grads[0].abs().max() > 0
    for gradient in grads[1:]:
        assert_close(gradient, grads[0])


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
    """1 - tanh^2 from a rounded tanh would be mostly wrong at scores of 30 under a cap of 5."""
    student, teacher = pair(softcap=5.0, scale=12.0, dtype=torch.float32)
    run = partial(distillation_loss, support="full", reduction="sum")
    wide = in_float64(student)
    expected = gradients(run(wide, teacher).loss, wide)[1]
    actual = gradients(run(student, teacher).loss, student)[1].double()
    large = expected.abs() > 1e-6 * expected.abs().max()
    assert ((actual - expected) / expected)[large].abs().max() < 1e-3

"""Extreme numbers: loss and gradients are right, or infinite where mathematics says so; what is NaN
stays in its row.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import (
    LazyLogits,
    SparseLogits,
    distillation_loss,
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
)
from tests.distill_cases import (
    OBJECTIVES,
    SUPPORTS,
    VOCAB,
    K,
    assert_same,
    eager_per_token,
    pair,
    support_ids,
)
from tests.reference import eager_sparse, full_logits, gradients, in_float64

METHODS = ["one_pass", "recompute"]
INTERPRETED = ("triton", "cuda-emulated")
NAN, INF = torch.nan, torch.inf


def objectives_for(support, backend):
    """Of those on K ids and that on one; two of them where a kernel is interpreted."""
    if backend in INTERPRETED:
        return {name: (OBJECTIVES[name], K) for name in ("bucket", "jsd")}
    on_k = {name: (objective, K) for name, objective in OBJECTIVES.items() if name != "mixture"}
    one = {} if support in ("union", "full") else {"policy_gradient": (policy_gradient, 1)}
    return on_k | one


def ids_of(tokens, k):
    """Given ids: distinct in each row."""
    return torch.arange(tokens)[:, None] + 7 * torch.arange(k)


def run(student, teacher, support, k, **options):
    """distillation_loss; support="ids" stands for ids_of."""
    ids = ids_of(student.hidden.shape[0], k) if support == "ids" else support
    return distillation_loss(student, teacher, k=k, support=ids, reduction="sum", **options)


def scaled(factor):
    return lambda model: replace(model, scale=factor)


def constant(model):
    return replace(model, hidden=torch.zeros_like(model.hidden), bias=torch.ones_like(model.bias))


def one_hot(model):
    """One logit is so far above the others that its probability is 1 in float32."""
    bias = torch.zeros_like(model.bias)
    bias[3] = 200.0
    return replace(model, bias=bias)


def thin_tail(model):
    """K tokens have all of the mass but about 1e-9."""
    bias = torch.full_like(model.bias, -24.0)
    bias[7 : 7 + K] = 0.0
    return replace(model, scale=0.3, bias=bias / 0.3)


EXTREMES = {
    "logits of ten thousand": (scaled(4e3), 1.0),
    "all logits equal": (constant, 1.0),
    "subnormal logits": (scaled(1e-40), 1.0),
    "one-hot": (one_hot, 1.0),
    "a tail of 1e-9": (thin_tail, 1.0),
    "temperature 1e-3": (scaled(1.0), 1e-3),
    "temperature 1e3": (scaled(1.0), 1e3),
}


def in_float32(model):
    wide = (model.hidden, model.weight, model.bias)
    narrow = [x.detach().float().requires_grad_(x.requires_grad) for x in wide]
    return replace(model, hidden=narrow[0], weight=narrow[1], bias=narrow[2])


def leaves(model):
    """The same model with leaves that take gradients."""
    hidden, weight, bias = (
        x.detach().clone().requires_grad_() for x in (model.hidden, model.weight, model.bias)
    )
    return replace(model, hidden=hidden, weight=weight, bias=bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_error_is_at_most_twice_that_of_float32_pytorch(backend, extreme, support, method):
    """Against the float64 definition, with a few roundings of the largest logit to spare, in the
    loss or in the gradient of a logit.
    """
    if backend in INTERPRETED and (support not in ("student", "full") or method == "recompute"):
        pytest.skip("kept for compiled backends")
    if backend == "triton" and extreme not in ("logits of ten thousand", "one-hot"):
        pytest.skip("kept for compiled backends")
    change, temperature = EXTREMES[extreme]
    student, teacher = (
        in_float32(leaves(change(model)))
        for model in pair(softcap=None, scale=1.0, temperature=temperature)
    )
    wide, wide_teacher = in_float64(student), in_float64(teacher)
    z, zt = full_logits(wide).detach(), full_logits(wide_teacher).detach()
    for name, (objective, k) in objectives_for(support, backend).items():
        given = support == "ids"
        ids = ids_of(z.shape[0], k) if given else support_ids(support, z, zt, k)

        def eager(inputs, theirs, dtype, ids=ids, objective=objective):
            rows = (eager_sparse(full_logits(x, dtype), ids) for x in (inputs, theirs))
            loss = objective(*rows)
            return loss.detach(), *gradients(loss.sum(), inputs)

        reference = eager(wide, wide_teacher, torch.float64)
        peer = eager(student, teacher, torch.float32)
        out = run(student, teacher, support, k, objective=objective, method=method, backend=backend)
        ours = out.per_token, *gradients(out.loss, student)
        rounding = 2.0**-22 * max(1.0, z.abs().max().item(), zt.abs().max().item())
        largest = max(student.hidden.abs().max().item(), student.weight.abs().max().item())
        chain = max(1.0, student.scale / temperature * largest)  # from a logit to an operand
        spares = [4 * rounding, *[rounding * chain] * 3]
        for actual, same, expected, spare in zip(ours, peer, reference, spares, strict=True):
            error, allowed = ((x.double() - expected).norm() for x in (actual, same))
            assert expected.isfinite().all()
            assert error <= 2 * allowed + spare, (name, error, allowed, spare)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("live", [3, 20])
def test_logits_of_minus_infinity_are_as_good_as_absent(backend, live, support, method):
    """A bias of -inf in both models, to below K tokens; against heads without these tokens."""
    if backend in INTERPRETED and (live != 3 or support != "student"):
        pytest.skip("kept for compiled backends")
    models, cut = [], []
    for model in pair(softcap=None):
        masked = leaves(model)
        with torch.no_grad():
            masked.bias[live:] = -INF
        models.append(masked)
        cut.append(replace(leaves(model), vocab_size=live))
    for name, (objective, k) in objectives_for(support, backend).items():
        out = run(*models, support, k, objective=objective, method=method, backend=backend)
        if support == "ids":
            given = ids_of(models[0].hidden.shape[0], k)
            ids = given.masked_fill(given >= live, -1)
        else:
            z, zt = (full_logits(x).detach() for x in cut)
            ids = support_ids(support, z, zt, min(k, live))
        if k == 1 and (ids < 0).any():
            continue  # a sampled token has a probability
        expected = objective(*(eager_sparse_with_tail(full_logits(x), ids) for x in cut))
        assert_close(out.per_token, expected.detach(), rtol=1e-12, atol=1e-12, msg=name)
        assert_same(gradients(out.loss, models[0]), gradients(expected.sum(), cut[0]), atol=1e-11)


def eager_sparse_with_tail(z, ids):
    """eager_sparse, whose tail is -inf without gradient where nothing is outside S."""
    columns = ids.masked_fill(ids < 0, z.shape[-1])
    on_support = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool)
    on_support.scatter_(-1, columns, True)
    nothing = on_support[:, :-1].all(-1)
    outside = z.masked_fill(on_support[:, :-1], -INF)
    tail = outside.masked_fill(nothing[:, None], 0.0).logsumexp(-1).masked_fill(nothing, -INF)
    values = z.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -INF)
    return SparseLogits(values, ids, tail, z.shape[-1])


def clash(on_student):
    """Two rows of unit vectors, of which the first has a logit of -inf at id 4 in one model."""
    hidden = torch.eye(2, dtype=torch.float64)
    weights = [torch.randn(7, 2, dtype=torch.float64) for _ in range(2)]
    weights[0 if on_student else 1][4, 0] = -INF
    # A product of -inf with the other row's 0 is NaN, so these logits come as a product of -1e200.
    models = []
    for weight in weights:
        extra = torch.zeros(7, 1, dtype=torch.float64)
        extra[weight[:, 0] == -INF] = -1e200
        beside = torch.tensor([[1e200], [0.0]], dtype=torch.float64)
        weight = torch.cat([weight.masked_fill(weight == -INF, 0.0), extra], dim=1)
        models.append(LazyLogits(torch.cat([hidden, beside], 1), weight))
    return leaves_of(models[0]), models[1]


def leaves_of(model):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (model.hidden, model.weight))
    return replace(model, hidden=hidden, weight=weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", ["full", "ids", "union"])
def test_a_divergence_is_infinite_where_a_probability_is_zero_on_one_side(backend, support, method):
    if backend in INTERPRETED and support != "full":
        pytest.skip("kept for compiled backends")
    ids = torch.arange(7).expand(2, 7) if support == "ids" else support
    options = {"k": 7, "support": ids, "reduction": "sum", "method": method, "backend": backend}
    student, teacher = clash(on_student=False)
    for objective in (reverse_kl, partial(reverse_kl, stop_gradient=False)):
        out = distillation_loss(student, teacher, objective=objective, **options)
        z, zt = full_logits(student).detach(), full_logits(teacher)
        log_p, log_q = z.log_softmax(-1), zt.log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert out.per_token[0] == INF
        assert_close(out.per_token, expected)
        dhidden = gradients(out.loss, student)[0]
        assert dhidden[1].isfinite().all()
        for compact in (True, False):  # the infinite row is left out, gradient and all
            weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
            kept = distillation_loss(
                student, teacher, objective=objective, token_weights=weights, compact=compact,
                **options,
            )  # fmt: skip
            assert_close(kept.loss, expected[1])
            grads = gradients(kept.loss, student)
            assert all(g.isfinite().all() for g in grads)
            assert_close(grads[0][1], dhidden[1])
    # The other way, the teacher's mass is where the student has none: p Q - q is finite all the
    # same. A product's gradient with the overflowing factor of 1e200 is not compared.
    for objective in (forward_kl, jsd):
        student, teacher = clash(on_student=True)
        out = distillation_loss(student, teacher, objective=objective, **options)
        assert (out.per_token[0] == INF) == (objective is forward_kl)
        assert out.per_token[1].isfinite()
        z, zt = full_logits(student).detach(), full_logits(teacher)
        p, q = z.softmax(-1), zt.softmax(-1)
        dweight = gradients(out.loss, student)[1][:, :2]
        if objective is forward_kl:
            assert_close(dweight, (p - q).T)
        assert dweight.isfinite().all()
        student, teacher = clash(on_student=False)
        out = distillation_loss(student, teacher, objective=objective, **options)
        assert out.per_token.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(out.loss, student))


BAD = 2
POISONS = {
    "NaN": (NAN, 0.0),
    "a product of +inf": (1e300, 1e300),
    "a product of -inf": (-1e300, 1e300),  # a row of -inf throughout
}


def poisoned(kind, model):
    """The model with one row's hidden state bad in a dimension that all other rows have at 0."""
    hidden, weight = model.hidden.detach(), model.weight.detach()
    in_row, in_weight = POISONS[kind]
    column = hidden.new_zeros(hidden.shape[0], 1)
    column[BAD] = in_row
    beside = weight.new_full((weight.shape[0], 1), in_weight)
    return replace(
        model, hidden=torch.cat([hidden, column], 1), weight=torch.cat([weight, beside], 1)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", POISONS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_bad_row_stays_one_row(backend, who, kind, support, method):
    """Its loss is NaN, or 0 where nothing is on S; no other row's loss or gradient changes. With a
    token weight of 0 it does not reach dweight either.
    """
    if backend in INTERPRETED and (kind != "NaN" or support != "student" or method == "recompute"):
        pytest.skip("kept for compiled backends")
    student, teacher = pair(softcap=None)
    others = torch.arange(student.hidden.shape[0]) != BAD
    if who == "student":
        student = poisoned(kind, student)
    else:
        teacher = poisoned(kind, teacher)
    objectives = objectives_for(support, backend)
    for name in set(objectives) - {"biased", "forward_bucket"}:  # as reverse_kl and bucket are
        objective, k = objectives[name]
        options = {"objective": objective, "method": method, "backend": backend}
        ids = ids_of(others.numel(), k)

        def loss(rows, options=options, ids=ids, k=k, **more):
            model = leaves(student)
            out = distillation_loss(
                model[rows], teacher[rows], k=k, reduction="sum",
                support=ids[rows] if support == "ids" else support, **options, **more,
            )  # fmt: skip
            return out, gradients(out.loss, model)

        expected, grads = loss(others)
        out, dirty = loss(slice(None))
        bad = out.per_token[BAD]
        no_support = kind == "a product of -inf" and (
            support in ("intersection", who) or name == "renormalize"
        )
        assert bad.isnan() or (no_support and bad == 0), (name, bad)
        assert_close(out.per_token[others], expected.per_token)
        assert_same([dirty[0][others]], [grads[0][others]])
        weighted, clean = loss(slice(None), token_weights=others.double(), compact=False)
        assert_close(weighted.loss, expected.loss)
        assert (clean[0][BAD] == 0).all()
        assert_same(clean, grads)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
@pytest.mark.parametrize("objective", [reverse_kl, forward_kl, jsd])
def test_a_model_without_mass_on_the_support_has_nothing_to_renormalise(
    objective, backend_name, method
):
    student, teacher = pair(softcap=None)
    for side in range(2):
        models = [leaves(student), leaves(teacher)]
        with torch.no_grad():
            models[side].bias[:K] = -INF
        ids = torch.arange(K).repeat(11, 1)
        ids[3:] += K
        out = distillation_loss(
            *models, support=ids, k=K, objective=partial(objective, tail="renormalize"),
            method=method, backend=backend_name,
        )  # fmt: skip
        assert (out.per_token[:3] == 0).all()
        assert (out.per_token[3:] > 0).all()
        grads = gradients(out.loss, models[0])
        assert (grads[0][:3] == 0).all()
        assert all(g.isfinite().all() for g in grads)


SERVED = {
    "-inf": [-0.5, -2.0, -INF],
    "above 0 by rounding": [1e-4, -INF, -INF],
    "p = 1 exactly": [0.0, -INF, -80.0],
    "P = 1 exactly": [-1.0986123] * 3,
    "P = 1 - 1e-9": [-1e-9, -27.7, -40.0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", SERVED)
@pytest.mark.parametrize("support", ["teacher", "intersection", "ids"])
def test_a_servers_log_probs_at_the_edges(backend, support, answer, method):
    """Against p and q in float64, where the teacher's tail has at least 2^-24."""
    if backend in INTERPRETED and (support != "teacher" or method == "recompute"):
        pytest.skip("kept for compiled backends")
    log_q = torch.tensor(SERVED[answer])
    ids = torch.tensor([[1, 4, 6], [2, 3, 8]])
    teacher = SparseLogits.from_log_probs(log_q.expand(2, 3), ids, vocab_size=9)
    hidden, weight = torch.randn(2, 3), torch.randn(9, 3)
    live = (log_q > -INF).double()
    for tail in ("drop", "bucket"):
        for objective in (reverse_kl, forward_kl):
            student = LazyLogits(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
            out = distillation_loss(
                student, teacher, k=3 if support != "intersection" else 9, reduction="sum",
                support=ids if support == "ids" else support, missing="drop", method=method,
                objective=partial(objective, tail=tail), backend=backend,
            )  # fmt: skip
            wide = hidden.double().requires_grad_()
            log_p = (wide @ weight.double().T).log_softmax(-1).gather(-1, ids)
            q = log_q.double().exp().expand(2, 3)
            rest = 1 - (log_p.exp() * live).sum(-1, keepdim=True)
            q_rest = (1 - q.sum(-1, keepdim=True)).clamp_min(2.0**-24)
            p, q = torch.cat([log_p.exp(), rest], -1), torch.cat([q, q_rest], -1)
            log_ratio = torch.cat([log_p, rest.log()], -1)
            q /= q.sum(-1, keepdim=True)  # a mass above 1 by rounding is brought to 1
            log_ratio = log_ratio - q.log()
            keep = torch.cat([live, torch.tensor([float(tail == "bucket")])]) > 0
            log_ratio = log_ratio.masked_fill(~keep, 0.0)
            first = p * log_ratio if objective is reverse_kl else -q * log_ratio
            if objective is reverse_kl and tail == "drop":
                first = p * log_ratio.detach()  # the stop-gradient
            expected = (first * keep).sum(-1)
            assert_close(out.per_token, expected.detach().float(), rtol=1e-5, atol=1e-5)
            actual = gradients(out.loss, student)[0]
            exact = torch.autograd.grad(expected.sum(), wide)[0]
            assert_close(actual, exact.float(), rtol=1e-4, atol=1e-5)


def test_log_probs_well_above_0_are_refused():
    with pytest.raises(ValueError, match="sum to at most 1, got 1"):
        SparseLogits.from_log_probs(torch.tensor([[0.02]]), torch.tensor([[3]]), vocab_size=9)


SHAPES = {
    "N = 0": (0, 3, 7, 2),
    "V = 1": (2, 3, 1, 1),
    "D = 1": (3, 1, 7, 2),
    "K = V": (3, 2, 4, 4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_shapes(backend, shape, support, method):
    if backend in INTERPRETED and support not in ("student", "full"):
        pytest.skip("kept for compiled backends")
    tokens, dim, vocab, k = SHAPES[shape]
    student, teacher = (
        LazyLogits(torch.randn(tokens, dim).double(), torch.randn(vocab, dim).double())
        for _ in range(2)
    )
    ids = torch.arange(k).repeat(tokens, 1)
    for name in ("bucket", "jsd") if backend in INTERPRETED else OBJECTIVES:
        objective = OBJECTIVES[name]
        if shape == "V = 1" and name == "renormalize":
            continue  # K = 1 is refused
        model = leaves_of(student)
        out = distillation_loss(
            model, teacher, k=k, support=ids if support == "ids" else support, method=method,
            objective=objective, backend=backend, reduction="sum",
        )  # fmt: skip
        z, zt = full_logits(model), full_logits(teacher)
        chosen = ids if support == "ids" else support_ids(support, z.detach(), zt, k)
        expected = objective(*(eager_sparse_with_tail(x, chosen) for x in (z, zt)))
        assert_close(out.per_token, expected.detach(), rtol=1e-12, atol=1e-13, msg=name)
        assert_same(gradients(out.loss, model), gradients(expected.sum(), model))
        if vocab == 1:
            assert (out.per_token == 0).all()


def test_heads_without_a_dimension_are_refused():
    with pytest.raises(ValueError, match="D >= 1"):
        LazyLogits(torch.zeros(2, 0), torch.zeros(5, 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_beyond_the_operands_range_are_finite(backend, dtype, support, method):
    """float16 ends at 65,504, but logits are float32."""
    if backend in INTERPRETED and support != "student":
        pytest.skip("kept for compiled backends")
    operands = [(300 * torch.randn(n, 6)).to(dtype) for n in (4, VOCAB, 4, VOCAB)]
    student = LazyLogits(*(x.requires_grad_() for x in operands[:2]))
    teacher = LazyLogits(*operands[2:])
    wide, wide_teacher = in_float64(student), in_float64(teacher)
    z, zt = full_logits(wide).detach(), full_logits(wide_teacher).detach()
    assert z.abs().max() > 65504
    for name, (objective, k) in objectives_for(support, backend).items():
        out = run(student, teacher, support, k, objective=objective, method=method, backend=backend)
        ids = ids_of(4, k) if support == "ids" else support_ids(support, z, zt, k)
        expected = eager_per_token(objective, wide, wide_teacher, ids)
        assert_close(out.per_token.double(), expected.detach(), rtol=1e-5, atol=0.1, msg=name)
        for actual, exact in zip(
            gradients(out.loss, student), gradients(expected.sum(), wide), strict=True
        ):
            assert actual.isfinite().all() or exact.abs().max() > torch.finfo(dtype).max

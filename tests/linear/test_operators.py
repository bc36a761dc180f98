"""The two operators, compared with full logits on every backend."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from opd_kernels import LazyLogits
from opd_kernels.linear.operators import linear_backward, linear_gather, linear_topk
from tests.device import DEVICE
from tests.reference import (
    OPTIONS,
    exact,
    full_logits,
    gradients,
    make_logits,
    operands,
    outside_lse,
    random_ids,
    sorted_by_logit,
)


def live_ids(ids, vocab):
    """Replace ids that the operators treat as empty by -1: repeated or outside the vocabulary."""
    result = ids.clone()
    for row in result.reshape(-1, ids.shape[-1]):
        seen = set()
        for slot, token in enumerate(row.tolist()):
            if token in seen or not 0 <= token < vocab:
                row[slot] = -1
            seen.add(token)
    return result


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k", [1, 5, 53])
def test_topk_equals_full_logits(backend, options, k):
    logits = make_logits(**options)
    z = full_logits(logits)
    s = logits.topk(k, entropy=True, backend=backend)
    assert torch.equal(s.ids, sorted_by_logit(z, k))
    exact(s.values, z.gather(-1, s.ids))
    exact(s.tail, outside_lse(z, s.ids))
    exact(s.entropy, torch.distributions.Categorical(logits=z).entropy())
    exact(s.lse, z.logsumexp(-1))


@pytest.mark.parametrize("options", OPTIONS)
def test_gather_equals_full_logits(backend, options):
    logits = make_logits(**options)
    z, ids = full_logits(logits), random_ids(logits, 6)
    live = live_ids(ids, logits.vocab_size)
    expected = z.gather(-1, live.clamp_min(0)).masked_fill(live < 0, -torch.inf)
    g = logits.gather(ids, entropy=True, backend=backend)
    exact(g.values, expected)
    exact(g.tail, outside_lse(z, live))
    exact(g.entropy, torch.distributions.Categorical(logits=z).entropy())
    assert g.ids is ids
    without_tail = logits.gather(ids, tail=False, backend=backend)
    exact(without_tail.values, expected)
    assert without_tail.tail is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("operator", "uses"),
    [(o, u) for o in ("topk", "gather") for u in ("values", "tail", "both")]
    + [("gather_no_tail", "values")],
)
def test_gradients_equal_full_logits(backend, options, operator, uses):
    logits = make_logits(**options)
    ids = random_ids(logits, 6)
    if operator == "topk":
        s = logits.topk(6, backend=backend)
        ids = s.ids
    elif operator == "gather":
        s = logits.gather(ids, backend=backend)
    else:
        s = logits.gather(ids, tail=False, backend=backend)
    z, live = full_logits(logits), live_ids(ids, logits.vocab_size)
    wv, wt = torch.randn_like(s.values), torch.randn(s.values.shape[0], dtype=torch.float64)
    loss, expected = s.values.new_zeros(()), z.new_zeros(())
    if uses != "tail":
        loss = loss + (s.values * wv)[live >= 0].sum()
        expected = expected + (z.gather(-1, live.clamp_min(0)) * wv)[live >= 0].sum()
    if uses != "values":
        loss = loss + (s.tail * wt).sum()
        expected = expected + (outside_lse(z, live) * wt).sum()
    for actual, reference in zip(gradients(loss, logits), gradients(expected, logits), strict=True):
        exact(actual, reference)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("operator", ["topk", "gather", "gather_no_tail"])
def test_gradcheck(backend, options, operator):
    # gradcheck calls the function twice per entry of every operand, which is slow in Triton's
    # interpreter.
    sizes = {"tokens": 4, "dim": 3, "vocab": 13}
    if backend == "triton":
        sizes = {"tokens": 2, "dim": 2, "vocab": 7}
    logits = make_logits(**sizes, **options)
    ids = random_ids(logits, 4)

    def run(*tensors):
        inputs = LazyLogits(
            tensors[0],
            tensors[1],
            tensors[2] if len(tensors) > 2 else None,
            logits.softcap,
            logits.scale,
            logits.temperature,
            logits.vocab_size,
        )
        if operator == "topk":
            s = inputs.topk(4, backend=backend)
            return s.values, s.tail
        s = inputs.gather(ids, tail=operator == "gather", backend=backend)
        values = s.values[s.values != -torch.inf]
        return (values,) if s.tail is None else (values, s.tail)

    assert gradcheck(run, operands(logits), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(dtype, with_bias):
    logits = make_logits(tokens=5, dim=3, vocab=13, dtype=dtype, with_bias=with_bias)
    head = (logits.hidden, logits.weight, logits.bias)
    scalars = (logits.softcap, logits.scale, logits.temperature, logits.vocab_size)
    torch.library.opcheck(linear_topk, (*head, *scalars, 4, True, None, "torch"))
    torch.library.opcheck(linear_topk, (*head, *scalars, 4, False, 64, "torch"))
    ids = random_ids(logits, 4)
    torch.library.opcheck(linear_gather, (*head, *scalars, ids, True, True, None, "torch"))
    torch.library.opcheck(linear_gather, (*head, *scalars, ids, True, False, None, "torch"))
    torch.library.opcheck(linear_gather, (*head, *scalars, ids, False, False, None, "torch"))


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_backward_computes_what_is_needed_only(with_bias, with_tail, operand):
    logits = make_logits(tokens=5, dim=3, vocab=13, with_bias=with_bias, requires_grad=False)
    head = (logits.hidden, logits.weight, logits.bias)
    scalars = (logits.softcap, logits.scale, logits.temperature, logits.vocab_size)
    ids = random_ids(logits, 4)
    values, tail, _ = linear_gather(*head, *scalars, ids, with_tail, False, None, "torch")
    upstream = (torch.randn_like(values), torch.randn_like(tail) if with_tail else None)
    results = []
    for needs in ([True, True, True], [number == operand for number in range(3)]):
        arguments = (*upstream, *head, *scalars, ids, values, tail, needs, None, "torch")
        torch.library.opcheck(linear_backward, arguments)
        results.append(linear_backward(*arguments))
    for number, (expected, actual) in enumerate(zip(*results, strict=True)):
        is_computed = number == operand and (with_bias or number < 2)
        assert torch.equal(actual, expected if is_computed else torch.empty(0).double())


@pytest.mark.parametrize("tail", [True, False])
def test_repeated_and_empty_slots_get_no_gradient(backend, tail):
    logits = make_logits(tokens=2)
    ids = torch.tensor([[4, 4, -1, 60], [7, 8, 7, 7]])
    values = logits.gather(ids, tail=tail, backend=backend).values
    live = torch.tensor([[True, False, False, False], [True, True, False, False]])
    assert torch.equal(values != -torch.inf, live)
    dvalues = torch.ones_like(values)
    actual = torch.autograd.grad(values, operands(logits), dvalues)
    z = full_logits(logits)
    expected = torch.autograd.grad(z[0, 4] + z[1, 7] + z[1, 8], operands(logits))
    for a, e in zip(actual, expected, strict=True):
        exact(a, e)


def test_leading_dimensions_and_no_tokens(backend):
    logits = make_logits(tokens=(2, 3))
    flat = LazyLogits(
        logits.hidden.reshape(6, -1), logits.weight, logits.bias, 3.0, 0.7, 0.8, logits.vocab_size
    )
    s, f = (
        logits.topk(4, entropy=True, backend=backend),
        flat.topk(4, entropy=True, backend=backend),
    )
    for name in ("values", "ids", "tail", "entropy"):
        assert torch.equal(getattr(s, name).reshape(getattr(f, name).shape), getattr(f, name))
    one_row = logits[0, 1].topk(4, backend=backend)
    exact(one_row.values, s.values[0, 1])
    expected = outside_lse(full_logits(logits)[0, 1], one_row.ids)
    for a, e in zip(gradients(one_row.tail, logits), gradients(expected, logits), strict=True):
        exact(a, e)
    empty = logits[:, :0]
    e = empty.topk(4, entropy=True, backend=backend)
    assert e.values.shape == (2, 0, 4)
    assert e.entropy.shape == (2, 0)
    grads = torch.autograd.grad(e.values.sum() + e.tail.sum(), operands(logits))
    assert all((g == 0).all() for g in grads)
    assert empty.gather(e.ids, backend=backend).values.shape == (2, 0, 4)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operands(backend, frozen):
    logits = make_logits()
    trained = {name: getattr(logits, name) for name in ("hidden", "weight", "bias")}
    loss = logits.topk(5, backend=backend).tail.sum()
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    trained.pop(frozen).requires_grad_(False)
    actual = torch.autograd.grad(logits.topk(5, backend=backend).tail.sum(), list(trained.values()))
    for name, gradient in zip(trained, actual, strict=True):
        exact(gradient, expected[name])


def test_mixed_dtypes_promote_and_gradients_keep_theirs(backend):
    hidden = torch.randn(5, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(40, 8).bfloat16().requires_grad_()
    s = LazyLogits(hidden, weight).topk(4, backend=backend)
    reference = LazyLogits(hidden, weight.float()).topk(4, backend=backend)
    assert s.values.dtype == torch.float32
    assert_close(s.values, reference.values, rtol=1e-6, atol=1e-6)
    dhidden, dweight = torch.autograd.grad(s.tail.sum(), (hidden, weight))
    assert dhidden.dtype == torch.float32
    assert dweight.dtype == torch.bfloat16
    wide = LazyLogits(hidden, weight.double()).topk(4, backend=backend)
    assert wide.values.dtype == torch.float64


def test_autocast_casts_operands_and_stays_out_of_the_driver(backend):
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(40, 8, requires_grad=True)
    expected = LazyLogits(hidden.bfloat16(), weight.bfloat16()).topk(4, backend=backend)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        s = LazyLogits(hidden, weight).topk(4, backend=backend)
        grads = torch.autograd.grad(s.tail.sum(), (hidden, weight))
    assert torch.equal(s.values, expected.values)
    assert torch.equal(s.tail, expected.tail)
    assert s.tail.dtype == torch.float32
    for ours, theirs in zip(
        grads, torch.autograd.grad(expected.tail.sum(), (hidden, weight)), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_log_prob_is_minus_the_cross_entropy(backend):
    logits = make_logits(tokens=(3, 4))
    targets = torch.randint(0, logits.vocab_size, (3, 4))
    targets[1, 2] = -100
    actual = logits.log_prob(targets, backend=backend)
    z = full_logits(logits)
    expected = torch.nn.functional.cross_entropy(
        z.reshape(12, -1), targets.reshape(-1), reduction="none"
    ).reshape(3, 4)
    exact(-actual, expected)
    for a, e in zip(
        gradients(-actual.sum(), logits), gradients(expected.sum(), logits), strict=True
    ):
        exact(a, e)
    assert logits.log_prob(torch.full((3, 4), 60), backend=backend).max() == -torch.inf


def test_materialize_equals_full_logits():
    logits = make_logits(tokens=(2, 3))
    exact(logits.materialize(), full_logits(logits))
    for a, e in zip(
        gradients(logits.materialize().square().sum(), logits),
        gradients(full_logits(logits).square().sum(), logits),
        strict=True,
    ):
        exact(a, e)


def test_a_double_backward_raises(backend):
    logits = make_logits()
    tail = logits.topk(5, backend=backend).tail.sum()
    (dhidden,) = torch.autograd.grad(tail, logits.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dhidden.sum().backward()


def test_a_loss_without_tail_makes_no_pass_over_the_vocabulary(backend, monkeypatch):
    logits = make_logits()
    s = logits.topk(5, backend=backend)
    given = logits.gather(s.ids, backend=backend)
    expected = gradients(full_logits(logits).gather(-1, s.ids).sum(), logits)

    def refuse(*args, **kwargs):
        raise AssertionError("the vocabulary was walked")

    monkeypatch.setattr("opd_kernels.linear.operators.backpropagate", refuse)
    for values in (s.values, given.values):
        for actual, e in zip(gradients(values.sum(), logits), expected, strict=True):
            exact(actual, e)
    monkeypatch.setattr("opd_kernels.linear.operators.reduce_logits", refuse)
    assert logits.gather(s.ids, tail=False, backend=backend).tail is None


def test_the_package_can_be_imported_a_second_time():
    """As after a notebook has dropped its modules: the operators are registered once."""
    code = """import sys, torch
import opd_kernels
first = opd_kernels.LazyLogits(torch.eye(3), torch.eye(3)).topk(2).values
for name in [n for n in sys.modules if n.startswith("opd_kernels")]:
    del sys.modules[name]
import opd_kernels
second = opd_kernels.LazyLogits(torch.eye(3), torch.eye(3)).topk(2).values
assert torch.equal(first, second)"""
    subprocess.run([sys.executable, "-c", code], check=True)

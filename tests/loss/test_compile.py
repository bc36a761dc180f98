"""torch.compile captures operators and divergences in one graph for any number of tokens."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from opd_kernels import LazyLogits, distillation_loss, forward_kl, jsd, reverse_kl

TOKENS = (5, 9, 17)


def operators(objective, student, teacher):
    s = replaced(student, softcap=3.0, temperature=0.8).topk(8, entropy=True)
    t = replaced(teacher, temperature=0.8).gather(s.ids)
    return objective(s, t).mean() + 0.0 * s.entropy.mean()


def replaced(operands, **options):
    return LazyLogits(*operands, **options)


def loss(options, student, teacher):
    weights = torch.arange(student[0].shape[0]) % 3
    options = {"token_weights": weights, "denominator": weights.sum(), "entropy": True} | options
    return distillation_loss(LazyLogits(*student), LazyLogits(*teacher), k=8, **options).loss


def cross_entropy(student, teacher):
    return -LazyLogits(*student).log_prob(torch.arange(student[0].shape[0])).mean()


WHOLE = {
    "reverse_kl": partial(operators, reverse_kl),
    "bucket": partial(operators, partial(reverse_kl, tail="bucket")),
    "renormalize": partial(operators, partial(reverse_kl, tail="renormalize")),
    "forward_kl": partial(operators, forward_kl),
    "jsd": partial(operators, partial(jsd, beta=0.3)),
    "cross_entropy": cross_entropy,
    "loss": partial(loss, {}),
    "mean": partial(loss, {"token_weights": None, "denominator": None}),
    "union": partial(loss, {"support": "union"}),
    "teacher": partial(loss, {"support": "teacher", "objective": jsd}),
}
BROKEN = {"one_pass": {"method": "one_pass"}, "full": {"support": "full"},
          "full, recomputed": {"support": "full", "method": "recompute"}}  # fmt: skip


def _problem(tokens, dtype=torch.float32):
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 16, dtype=dtype), torch.randn(97, 16, dtype=dtype)
    student = (hidden.requires_grad_(), weight.requires_grad_())
    return student, (torch.randn(tokens, 12, dtype=dtype), torch.randn(97, 12, dtype=dtype))


def _assert_same(compiled, eager, tokens, **tolerance):
    student, teacher = _problem(tokens)
    actual, expected = compiled(student, teacher), eager(student, teacher)
    assert_close(actual, expected, **tolerance)
    gradients = [torch.autograd.grad(x, student) for x in (actual, expected)]
    assert_close(*gradients, **tolerance)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_for_every_number_of_tokens(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(WHOLE[name], backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for tokens in TOKENS:
        _assert_same(compiled, WHOLE[name], tokens)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == [counts[0]] * len(TOKENS)


@pytest.mark.parametrize("name", BROKEN)
def test_what_walks_tokens_stays_outside_the_graph(name):
    """The loss does not change. With fullgraph=True the error names the alternative."""
    eager = partial(loss, BROKEN[name])
    compiled = torch.compile(eager, backend="aot_eager", dynamic=True)
    for tokens in TOKENS:
        _assert_same(compiled, eager, tokens)
    torch.compiler.reset()
    whole = torch.compile(eager, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="method='recompute' with K ids does"):
        whole(*_problem(5))


def test_autocast_inside_and_around_a_compiled_step():
    def inside(student, teacher):
        with torch.autocast("cpu", torch.bfloat16):
            return loss({"objective": partial(reverse_kl, tail="bucket")}, student, teacher)

    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in TOKENS:
        _assert_same(compiled, inside, tokens, rtol=1e-2, atol=1e-3)
    around = torch.compile(WHOLE["bucket"], backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.autocast("cpu", torch.bfloat16):
        _assert_same(around, WHOLE["bucket"], 9, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [{"method": "recompute"}, {"method": "one_pass"}])
def test_activation_checkpointing(options):
    """The loss and the layer before it are computed again in backward."""

    def step(student, teacher):
        return loss(options, (torch.tanh(student[0]), student[1]), teacher)

    student, teacher = _problem(9)
    expected = step(student, teacher)
    actual = checkpoint(step, student, teacher, use_reentrant=False)
    assert_close(actual, expected)
    gradients = [torch.autograd.grad(x, student) for x in (actual, expected)]
    assert_close(*gradients)


@pytest.mark.slow
def test_inductor_compiles_a_step():
    compiled = torch.compile(WHOLE["bucket"], fullgraph=True, dynamic=True)
    for tokens in TOKENS:
        _assert_same(compiled, WHOLE["bucket"], tokens, rtol=1e-4, atol=1e-5)

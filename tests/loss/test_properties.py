"""Properties of all losses on random problems. `make fuzz` tries ten times as many."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from opd_kernels import LazyLogits, available_backends, distillation_loss
from opd_kernels.linear.plan import MIN_COLUMNS, one_pass_rows, recompute_sizes
from tests.distill_cases import OBJECTIVES, assert_same, eager_per_token, support_ids
from tests.reference import eager_sparse, full_logits, gradients, in_float64, leaves, operands

BACKENDS = [name for name in ("torch", "cpu") if name in available_backends()]
EVERYTHING = ["student", "teacher", "union", "intersection", "full"]


@dataclass(frozen=True)
class Problem:
    """Arguments of distillation_loss. Tensors come from a seed, so that hypothesis can print it."""

    seed: int
    tokens: int
    dims: tuple[int, int]  # D of student and teacher
    vocab: int
    padded: tuple[int, int]  # rows of their weights beyond V
    head: dict[str, Any]
    with_bias: bool
    peak: float  # scale of the hidden states: how peaked the distributions are
    objective: str
    support: str
    k: int
    method: str
    chunk: int  # logits
    backend: str
    dtype: torch.dtype

    def operands(self) -> tuple[LazyLogits, LazyLogits, torch.Tensor]:
        """Return student, teacher and token weights, some of them 0. The K largest logits of a row
        have no ties.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, factor: float = 1.0) -> torch.Tensor:
            return (factor * torch.randn(*shape, generator=generator)).to(self.dtype)

        models = []
        for number, (dim, padded) in enumerate(zip(self.dims, self.padded, strict=True)):
            hidden = random(self.tokens, dim, factor=self.peak)
            weight = random(self.vocab + padded, dim)
            bias = random(self.vocab + padded) if self.with_bias else None
            head = self.head if number == 0 else self.head | {"softcap": None, "scale": 1.0}
            model = LazyLogits(hidden, weight, bias, vocab_size=self.vocab, **head)
            models.append(leaves(model) if number == 0 else model)
        for model in models:  # a saturated softcap makes ties, which rounding would decide
            best = full_logits(model).sort(descending=True).values[:, : self.k + 1]
            assume(bool((best.diff(dim=-1).abs() > 1e-9).all()))
        weights = torch.rand(self.tokens, generator=generator, dtype=torch.float64)
        weights[1::4] = 0
        return models[0], models[1], weights

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments of distillation_loss."""
        item = torch.promote_types(self.dtype, torch.float32).itemsize
        return {
            "k": self.k, "objective": OBJECTIVES[self.objective], "support": self.support,
            "method": self.method, "chunk_bytes": self.chunk * item, "backend": self.backend,
        }  # fmt: skip


@st.composite
def problems(draw, supports=tuple(EVERYTHING), dtypes=(torch.float64,)):
    vocab = draw(st.integers(2, 70))
    head = {
        "softcap": draw(st.sampled_from([None, None, 3.0, 30.0])),
        "scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }
    objective = draw(st.sampled_from(sorted(OBJECTIVES)))
    min_k = 2 if objective == "renormalize" else 1
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        tokens=draw(st.integers(0, 9)),
        dims=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        vocab=vocab,
        padded=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        head=head,
        with_bias=draw(st.booleans()),
        peak=draw(st.sampled_from([0.1, 1.0, 4.0])),
        objective=objective,
        support=draw(st.sampled_from(supports)),
        k=draw(st.integers(min_k, vocab)),
        method=draw(st.sampled_from(["one_pass", "recompute"])),
        chunk=draw(st.integers(1, 300)),
        backend=draw(st.sampled_from(BACKENDS)),
        dtype=draw(st.sampled_from(dtypes)),
    )


def eager(problem, student, teacher, weights):
    """Loss and gradients of eager PyTorch on full logits, at the ids of the support."""
    with torch.no_grad():
        z, zt = full_logits(student), full_logits(teacher)
    ids = support_ids(problem.support, z, zt, problem.k)
    per_token = eager_per_token(OBJECTIVES[problem.objective], student, teacher, ids)
    per_token = per_token.masked_fill(weights == 0, 0.0)
    loss = (per_token * weights).sum() / weights.sum().clamp_min(1e-300)
    return loss, gradients(loss, student)


@given(problems())
def test_loss_and_gradients_are_those_of_full_logits(problem):
    student, teacher, weights = problem.operands()
    expected, grads = eager(problem, student, teacher, weights)
    loss = distillation_loss(student, teacher, token_weights=weights, **problem.options).loss
    assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    scale = max(float(g.abs().max()) if g.numel() else 0.0 for g in grads)
    assert_same(gradients(loss, student), grads, rtol=1e-8, atol=1e-11 * max(1.0, scale))


@given(problems(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_errors_are_those_of_the_dtype(problem):
    """Errors against float64 on the same operands are at most twice those of eager float32, plus
    the rounding of the result. The support is fixed, since another dtype may select other ids.
    """
    student, teacher, weights = problem.operands()
    wide, wide_teacher = in_float64(student), in_float64(teacher)
    with torch.no_grad():
        z, zt = full_logits(wide), full_logits(wide_teacher)
    ids = support_ids(problem.support, z, zt, problem.k)
    if problem.objective == "renormalize" and bool(((ids >= 0).sum(-1) < 2).any()):
        return  # some rows have no loss
    options = problem.options | {"support": ids, "token_weights": weights.float()}
    loss = distillation_loss(student, teacher, **options).loss
    actual = [loss, *gradients(loss, student)]

    def definition(dtype):
        ours = leaves(wide, dtype)
        z, zt = full_logits(ours, dtype), full_logits(wide_teacher, dtype).detach()
        objective = OBJECTIVES[problem.objective]
        per_token = objective(eager_sparse(z, ids), eager_sparse(zt, ids))
        scaled = (per_token * weights.to(dtype)).masked_fill(weights == 0, 0.0)
        loss = scaled.sum() / weights.sum().to(dtype).clamp_min(1e-30)
        return [loss.detach(), *gradients(loss, ours)]

    exact, same = definition(torch.float64), definition(torch.float32)
    small = torch.finfo(torch.float32).eps
    # A loss on S, and the gradient of a logit, are sums of terms with both signs. Their error is
    # that of a probability even if the terms cancel. dhidden and dweight multiply it by an operand.
    factor = abs(problem.head["scale"]) / problem.head["temperature"]
    largest = max([1.0, *(float(x.detach().abs().max()) for x in operands(wide) if x.numel())])
    for number, (ours, true, float32) in enumerate(zip(actual, exact, same, strict=True)):
        assert torch.isfinite(ours).all()
        returned = torch.finfo(ours.dtype)
        error, twice = (ours.detach().double() - true).norm(), 2 * (float32.double() - true).norm()
        size = factor * largest if number else 1.0 + float(true.abs())
        rounding = returned.eps * (true.norm() + returned.smallest_normal * true.numel())
        assert error <= twice + rounding + 8 * small * size, (number, float(error))


@given(problems(), st.integers(0, 2**31))
def test_rows_may_come_in_any_order(problem, seed):
    student, teacher, weights = problem.operands()
    order = torch.randperm(problem.tokens, generator=torch.Generator().manual_seed(seed))
    run = partial(distillation_loss, **problem.options)
    output = run(student, teacher, token_weights=weights)
    shuffled = run(student[order], teacher[order], token_weights=weights[order])
    assert_close(shuffled.per_token, output.per_token[order], rtol=1e-10, atol=1e-12)
    assert torch.equal(shuffled.student.ids, output.student.ids[order])
    grads = [gradients(x.loss, student) for x in (shuffled, output)]
    assert_same(*grads, rtol=1e-9, atol=1e-11)


@given(problems(supports=("student", "teacher", "union", "full")), st.integers(0, 2**31))
def test_tokens_may_have_other_ids(problem, seed):
    """A permutation of the vocabulary changes only the ids."""
    student, teacher, weights = problem.operands()
    order = torch.randperm(problem.vocab, generator=torch.Generator().manual_seed(seed))

    def permuted(logits):
        rows = torch.cat([order, torch.arange(problem.vocab, logits.weight.shape[0])])
        bias = None if logits.bias is None else logits.bias[rows]
        return replace(logits, weight=logits.weight[rows], bias=bias)

    run = partial(distillation_loss, token_weights=weights, **problem.options)
    output, other = run(student, teacher), run(permuted(student), permuted(teacher))
    assert_close(other.per_token, output.per_token, rtol=1e-9, atol=1e-11)
    live = other.student.ids >= 0
    assert torch.equal(order[other.student.ids.clamp_min(0)][live],
                       output.student.ids[live])  # fmt: skip
    assert_same(gradients(other.loss, student), gradients(output.loss, student), 1e-8, 1e-10)


@given(problems(), st.integers(1, 300), st.sampled_from(BACKENDS))
def test_chunks_and_backends_make_no_difference(problem, chunk, backend):
    student, teacher, weights = problem.operands()
    run = partial(distillation_loss, student, teacher, token_weights=weights)
    output = run(**problem.options)
    other = run(**problem.options | {"chunk_bytes": 8 * chunk, "backend": backend})
    assert torch.equal(other.student.ids, output.student.ids)
    assert_close(other.loss, output.loss, rtol=1e-10, atol=1e-12)
    assert_same(gradients(other.loss, student), gradients(output.loss, student), 1e-9, 1e-11)


@given(problems(), st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(problem, constant):
    """The gradients of a row's logits sum to 0."""
    problem = replace(problem, with_bias=True, head=problem.head | {"softcap": None})
    student, teacher, weights = problem.operands()
    shifted = leaves(replace(student, bias=student.bias + constant))
    run = partial(distillation_loss, token_weights=weights, **problem.options)
    output, other = run(student, teacher), run(shifted, teacher)
    assert_close(other.per_token, output.per_token, rtol=1e-8, atol=1e-11)
    grads = gradients(output.loss, student)
    assert_same(gradients(other.loss, shifted), grads, rtol=1e-7, atol=1e-10)
    size = float(grads[2].abs().sum())
    assert abs(float(grads[2].sum())) <= 1e-11 * max(1.0, size)


@given(problems(), st.integers(0, 9))
def test_parts_of_a_batch_add_up(problem, cut):
    student, teacher, weights = problem.operands()
    cut, total = min(cut, problem.tokens), float(weights.sum()) or 1.0
    run = partial(distillation_loss, denominator=total, **problem.options)
    whole = run(student, teacher, token_weights=weights)
    parts = [
        run(student[rows], teacher[rows], token_weights=weights[rows])
        for rows in (slice(0, cut), slice(cut, None))
    ]
    loss = parts[0].loss + parts[1].loss
    assert_close(loss, whole.loss, rtol=1e-10, atol=1e-12)
    assert_same(gradients(loss, student), gradients(whole.loss, student), 1e-9, 1e-11)


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 18), st.integers(2, 8), st.data())
def test_chunks_grow_with_their_budget_and_stay_within_it(tokens, vocab, width, data):
    device = torch.device("cpu")
    small = data.draw(st.integers(1, 1 << 32), label="chunk_bytes")
    large = data.draw(st.integers(small, 1 << 33), label="more of it")
    rows = [one_pass_rows(tokens, vocab, width, device, x) for x in (small, large)]
    assert 1 <= rows[0] <= rows[1] <= tokens
    assert rows[0] == 1 or rows[0] * vocab * width <= small
    extent = recompute_sizes(tokens, vocab, width, device, small)
    assert 1 <= extent[0] <= tokens
    assert 1 <= extent[1] <= vocab
    smallest_chunk = min(vocab, MIN_COLUMNS) * width  # one row
    assert extent[0] * extent[1] * width <= max(small, smallest_chunk)


def test_every_kind_of_problem_is_drawn():
    """Detects a strategy that never draws one of the cases."""
    seen = []

    @given(problems())
    def draw(problem):
        seen.append(problem)

    draw()
    assert {x.support for x in seen} == set(EVERYTHING)
    assert {x.method for x in seen} == {"one_pass", "recompute"}
    assert {x.backend for x in seen} == set(BACKENDS)
    assert len({x.objective for x in seen}) >= len(OBJECTIVES) - 1

"""Products of 16-bit operands with float32 results, as GPUs compute them natively.

On a CPU torch.mm(..., out_dtype=...) does not exist, and a product of upcast operands replaces it.
All other code is what runs on a GPU: the walks, 16-bit chunks of gradients, float16 scaling and the
fused kernels.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from opd_kernels import LazyLogits, distillation_loss, jsd, reverse_kl
from opd_kernels.backends import select_backend
from opd_kernels.backends.records import Operands, RowGradient
from opd_kernels.linear import products as linear_products
from opd_kernels.linear.vocabulary_walk import backpropagate
from tests.device import DEVICE
from tests.reference import gradients, in_float64, make_logits

DTYPES = [torch.bfloat16, torch.float16]
ORDERS = ["one_pass", "recompute"]
TOKENS, DIM, VOCAB, K = 9, 24, 71, 4
RENORMALIZED = partial(reverse_kl, tail="renormalize")


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Replace the native products on a CPU and count their calls."""
    if DEVICE.type == "cuda":
        return None
    counts = {"written": 0, "added": 0}

    def product(a, b, out):
        assert a.dtype == b.dtype != out.dtype
        counts["written"] += 1
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def add_product(total, a, b):
        assert a.dtype == b.dtype != total.dtype
        counts["added"] += 1
        total.addmm_(a.to(total.dtype), b.to(total.dtype))

    monkeypatch.setattr(linear_products, "_multiplies_16_bit", lambda device: True)
    monkeypatch.setattr(linear_products, "_product", product)
    monkeypatch.setattr(linear_products, "_add_product_", add_product)
    return counts


def make_pair(dtype, **options):
    student = make_logits(TOKENS, DIM, VOCAB, dtype=dtype, **options)
    return student, make_logits(TOKENS, DIM + 3, VOCAB, dtype=dtype, requires_grad=False)


def errors(actual, expected):
    """Relative error of each gradient in the Frobenius norm."""
    return [
        ((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)
    ]


def eager_gradients(student, teacher):
    """Gradients of the full reverse KL in eager PyTorch, and the teacher's log-probabilities."""
    z = torch.nn.functional.linear(student.hidden, student.weight[:VOCAB], student.bias[:VOCAB])
    log_p, log_q = z.float().log_softmax(-1), torch.randn(TOKENS, VOCAB).log_softmax(-1)
    return gradients((log_p.exp() * (log_p - log_q)).sum(-1).mean(), student), log_q


def rounding_of(dtype):
    """Relative error of eager PyTorch's gradients in a dtype."""
    student, teacher = make_pair(dtype, softcap=None, scale=1.0, temperature=1.0)
    actual, log_q = eager_gradients(student, teacher)
    exact = in_float64(student)
    z = torch.nn.functional.linear(exact.hidden, exact.weight[:VOCAB], exact.bias[:VOCAB])
    log_p = z.log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q.double())).sum(-1).mean()
    return max(errors(actual, gradients(loss, exact)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_bytes": 40 * VOCAB, "objective": partial(reverse_kl, tail="bucket")},
        {"support": "teacher"},
        {"objective": RENORMALIZED},
        {"objective": lambda s, t: 100 * reverse_kl(s, t)},
        {"support": "full"},
        {"support": "full", "objective": partial(jsd, beta=0.3), "chunk_bytes": 40 * VOCAB},
        {"support": "full", "objective": lambda s, t: reverse_kl(s, t)},
    ],
    ids=[
        "topk",
        "chunks",
        "teacher",
        "renormalize",
        "steep",
        "full",
        "full chunks",
        "full own objective",
    ],
)
def test_gradients(backend, products, dtype, method, options):
    student, teacher = make_pair(dtype)
    options = {"k": K, "method": method} | options
    out = distillation_loss(student, teacher, backend=backend, **options)
    actual = gradients(out.loss, student)
    assert products is None or products["written"] > 0
    assert [g.dtype for g in actual] == [dtype] * 3
    wide, wide_teacher = in_float64(student), in_float64(teacher).detach()
    expected = distillation_loss(wide, wide_teacher, backend="torch", **options)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert max(errors(actual, gradients(expected.loss, wide))) <= 2 * rounding_of(dtype)


@pytest.mark.parametrize("options", [{"gradient_filter": 2.0**-40}, {"objective": RENORMALIZED}])
def test_rows_are_summed_in_float32_even_for_a_single_chunk(backend, options):
    """All tokens have the same hidden state, whose sum in bfloat16 would stop growing."""
    tokens = 600
    hidden = torch.ones(tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, 8).bfloat16().requires_grad_()
    teacher = LazyLogits(hidden.detach(), torch.randn(VOCAB, 8).bfloat16())
    student = LazyLogits(hidden, weight)
    options = {"k": K, "method": "one_pass", "reduction": "sum", "backend": backend} | options
    loss = distillation_loss(student, teacher, **options).loss
    one = distillation_loss(student[:1], teacher[:1], **options).loss
    dweight, dweight_of_one = (torch.autograd.grad(x, weight)[0].float() for x in (loss, one))
    torch.testing.assert_close(dweight, tokens * dweight_of_one, rtol=0.01, atol=1e-4)


FACTORS = [2.0**-26, 2.0**20]  # of a mean over many tokens, and of a loss scaler


@pytest.mark.parametrize("factor", FACTORS)
def test_one_pass_in_float16_neither_flushes_nor_overflows(backend, factor):
    student, teacher = make_pair(torch.float16)
    weights = torch.full((TOKENS,), factor)
    options = {"k": K, "method": "one_pass", "backend": backend, "reduction": "sum"}
    small = distillation_loss(student, teacher, token_weights=weights, **options).loss / factor
    plain = distillation_loss(student, teacher, **options).loss
    for a, b in zip(gradients(small, student), gradients(plain, student), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", FACTORS)
def test_recompute_in_float16_neither_flushes_nor_overflows(backend, factor):
    student, _ = make_pair(torch.float16)
    sparse = student.topk(K, backend=backend).detach()
    dvalues, dtail = torch.randn(TOKENS, K), torch.randn(TOKENS)

    def sums(factor):
        """Gradients in float32, so that only a 16-bit chunk could flush to 0."""
        operands = (student.hidden, student.weight, student.bias)
        dhidden, dweight, dbias = (torch.zeros_like(t, dtype=torch.float32) for t in operands)
        epilogues = select_backend(backend, student.hidden.device)
        rows = RowGradient(sparse.ids, dvalues * factor, sparse.tail, dtail * factor)
        head, sums = student.flat().head, (dhidden, dweight, dbias)
        backpropagate(Operands(student.hidden, head), rows, sums, epilogues, None)
        return sums

    with torch.no_grad():
        for a, b in zip(sums(factor), sums(1.0), strict=True):
            assert torch.equal(a, b * factor)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_operands_of_any_strides(backend, name):
    student, _ = make_pair(torch.bfloat16)
    transposed = getattr(student, name).detach().t().contiguous().t().requires_grad_()
    other = replace(student, **{name: transposed})
    ids = torch.zeros(TOKENS, 2).long()
    results = []
    for logits in (student, other):
        tail = logits.gather(ids, backend=backend).tail
        results.append((tail, *gradients(tail.sum(), logits)))
    torch.testing.assert_close(results[1], results[0])


def test_without_an_accumulating_addmm(monkeypatch):
    """Before version 2.10, PyTorch cannot add a 16-bit product to a float32 sum: use mm and add."""
    total = torch.ones(3, 5)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    monkeypatch.undo()
    monkeypatch.setattr(linear_products, "_ADDS_IN_PLACE", False)
    monkeypatch.setattr(linear_products, "_GPU_BYTES", 40)  # two rows at a time
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a @ b).to(out_dtype))
    linear_products._add_product_(total, a, b)
    torch.testing.assert_close(total, 1 + a @ b)


def test_mixed_operands_are_upcast(backend):
    student, teacher = make_pair(torch.float32)
    hidden = student.hidden.detach().bfloat16().requires_grad_()
    mixed = replace(student, hidden=hidden)
    assert linear_products.operand_dtype(hidden, student.weight) == torch.float32
    loss = distillation_loss(mixed, teacher, k=K, backend=backend).loss
    expected = distillation_loss(replace(student, hidden=hidden.float()), teacher, k=K).loss
    torch.testing.assert_close(loss, expected)

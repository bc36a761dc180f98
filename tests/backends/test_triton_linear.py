"""Triton kernels with a matrix product inside, compared with a product and the torch backend."""

from dataclasses import replace

import pytest
import torch

from opd_kernels.backends import available_backends
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, Head, Operands, RowGradient, RowState
from opd_kernels.sparse_logits import canonical_ids
from tests.device import DEVICE
from tests.reference import head_in_float64

if "triton" not in available_backends():
    pytest.skip("needs Triton", allow_module_level=True)
from opd_kernels.backends.triton.linear import TritonFusedEpilogues

definition, fused = Epilogues(), TritonFusedEpilogues()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 5, 7, 1), (37, 23, 83, 4), (20, 48, 200, 3)]  # N, D, V, K


def make_problem(rows, dim, vocab, k, dtype, every_option):
    """Return hidden, a head with a padded weight, ids with empty slots, and float64 products."""
    hidden, weight = (torch.randn(n, dim, device=DEVICE).to(dtype) for n in (rows, vocab + 3))
    head = Head(weight, None, None, 1.0, 1.0, vocab)
    if every_option:
        bias = torch.randn(vocab + 3, device=DEVICE).to(dtype)
        head = Head(weight, bias, 3.0, 0.7, 0.8, vocab)
    ids = canonical_ids(torch.randint(-2, vocab + 2, (rows, k), device=DEVICE), vocab)
    return hidden, head, ids, hidden.double() @ weight[:vocab].double().T


def assert_close_to_float32(actual, reference, terms):
    """Allow one float32 rounding of the largest value for each of the D terms of a product."""
    finite = reference.isfinite()
    assert torch.equal(actual.double()[~finite], reference[~finite])
    bound = torch.finfo(torch.float32).eps * (terms + 4) * max(1, reference[finite].abs().max())
    assert (actual.double() - reference)[finite].abs().max() <= bound


@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update(shape, dtype, every_option):
    hidden, head, ids, raw = make_problem(*shape, dtype, every_option)
    like = torch.empty(0, device=DEVICE)
    state = RowState.for_ids(ids, every_option, like)
    fused.update(Operands(hidden, head), state)
    expected = RowState.for_ids(ids, every_option, like.double())
    definition.update(Chunk(raw, head_in_float64(head)), expected)
    assert_close_to_float32(state.values, expected.values, shape[1])
    assert_close_to_float32(state.tail(), expected.tail(), shape[1])
    if every_option:
        assert_close_to_float32(state.entropy(), expected.entropy(), shape[1])
    again = RowState.for_ids(ids, every_option, like)
    fused.update(Operands(hidden, head), again)
    assert torch.equal(again.values, state.values)
    assert torch.equal(again.sum, state.sum)


@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, every_option):
    hidden, head, ids, raw = make_problem(*shape, dtype, every_option)
    rows, dim, vocab, k = shape
    state = RowState.for_ids(ids, False, torch.empty(0, dtype=torch.float64, device=DEVICE))
    definition.update(Chunk(raw, head_in_float64(head)), state)
    dvalues, dtail = torch.randn(rows, k, device=DEVICE), torch.randn(rows, device=DEVICE)
    first, tail = vocab // 48 * 16, state.tail()
    expected = raw[:, first:].clone()
    exact = RowGradient(ids, dvalues.double(), tail, dtail.double())
    definition.gradient(Chunk(expected, head_in_float64(head), first), exact, expected)
    out = torch.empty(rows, vocab - first, dtype=dtype, device=DEVICE)
    support = fused.support(ids, Operands(hidden, head))
    gradient = RowGradient(ids, dvalues, tail.float(), dtail)
    fused.gradient(Operands(hidden, head), first, support, gradient, out)
    # exp turns an error of the logit into a relative one; the result is rounded to out's dtype.
    largest = raw.abs().max().item()
    bound = torch.finfo(torch.float32).eps * (dim + 4) * max(1.0, largest)
    bound = (bound + torch.finfo(dtype).eps) * expected.abs().max().item()
    assert (out.double() - expected).abs().max() <= bound


def test_an_infinite_bias_and_a_row_that_is_all_support():
    hidden, head, _, _ = make_problem(3, 8, 40, 1, torch.float32, True)
    head.bias[9:40] = -torch.inf
    head = replace(head, softcap=None)
    ids = torch.arange(9, device=DEVICE).expand(3, 9).contiguous()
    state = RowState.for_ids(ids, True, torch.empty(0, device=DEVICE))
    fused.update(Operands(hidden, head), state)
    assert (state.tail() == -torch.inf).all()
    z = head.logits(hidden @ head.weight[:40].T + head.bias[:40])
    torch.testing.assert_close(state.values, z[:, :9])
    entropy = torch.distributions.Categorical(logits=z[:, :9]).entropy()
    torch.testing.assert_close(state.entropy(), entropy)
    dvalues, dtail = torch.ones(3, 9, device=DEVICE), torch.ones(3, device=DEVICE)
    out = torch.empty(3, 40, device=DEVICE)
    support = fused.support(ids, Operands(hidden, head))
    gradient = RowGradient(ids, dvalues, state.tail(), dtail)
    fused.gradient(Operands(hidden, head), 0, support, gradient, out)
    assert out[:, 9:].abs().max() == 0
    torch.testing.assert_close(out[:, :9], torch.full((3, 9), 0.7 / 0.8))

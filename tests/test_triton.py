"""The Triton kernels against the torch epilogues, on chunks that the driver does not make too.

The operator tests run the same kernels through the driver; here are 16-bit chunks, strided ones,
large K, empty slots and infinite logits. Off a GPU they run in Triton's interpreter.
"""

import pytest
import torch

from opd_kernels.backends import RowState, available_backends, select_backend
from opd_kernels.backends import torch as definition
from opd_kernels.head import Head
from opd_kernels.sparse import canonical_ids
from tests.device import DEVICE
from tests.reference import head_in_float64

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="needs Triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels():
    return select_backend("triton", DEVICE)


def make_chunk(rows, columns, dtype=torch.float32, options=(), spread=3.0):
    """Raw logits [rows, columns] whose rows lie 3 elements apart, and their head."""
    raw = (torch.randn(rows, columns + 3, device=DEVICE) * spread).to(dtype)[:, :columns]
    options = set(options)
    bias = torch.randn(columns + 5, device=DEVICE).to(dtype) if "bias" in options else None
    softcap = 4.0 if "softcap" in options else None
    scale, temperature = (-1.5, 0.7) if "scale" in options else (1.0, 1.0)
    weight = torch.empty(columns + 5, 1, device=DEVICE)
    return raw, Head(weight, bias, softcap, scale, temperature, columns)


def state_of(backend, raw, head, k_or_ids, entropy=True, pieces=1):
    """The state after the chunk was walked in so many pieces."""
    dtype = torch.float64 if raw.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    if isinstance(k_or_ids, int):
        state = RowState.for_topk(raw.shape[0], k_or_ids, entropy, like)
    else:
        state = RowState.for_ids(canonical_ids(k_or_ids, raw.shape[1]), entropy, like)
    width = -(-raw.shape[1] // pieces)
    for first in range(0, raw.shape[1], width):
        backend.update(raw[:, first : first + width], first, head, state)
    return state


def in_float64(raw, head):
    return raw.double(), head_in_float64(head)


def assert_no_worse(actual, same_dtype, reference):
    """At most twice PyTorch's own rms error, which on a few numbers may by luck be under a
    rounding's; an infinity stands where the reference has it.
    """
    finite = reference.isfinite()
    assert torch.equal(actual.double()[~finite], reference[~finite])
    expected = reference[finite]

    def rms(values):
        return (values.double()[finite] - expected).square().mean().sqrt()

    rounding = torch.finfo(actual.dtype).eps / 2 * expected.abs().max()
    assert rms(actual) <= 2 * torch.maximum(rms(same_dtype), rounding)


def statistics(state):
    return state.values, state.tail(), state.entropy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(), ("bias", "softcap", "scale")], ids=["plain", "all"])
@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 5, 1), (7, 301, 20), (3, 517, 128)])
def test_update_selects_as_pytorch_does(kernels, dtype, options, rows, columns, k):
    k = min(k, columns - 1)
    raw, head = make_chunk(rows, columns, dtype, options)
    ours = state_of(kernels, raw, head, k, pieces=2)
    theirs = state_of(definition, raw.float(), head, k)
    reference = state_of(definition, *in_float64(raw, head), theirs.ids)
    assert torch.equal(ours.ids, theirs.ids)
    for a, t, r in zip(statistics(ours), statistics(theirs), statistics(reference), strict=True):
        assert_no_worse(a, t, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_update_and_gradient_at_given_ids(kernels, dtype, k):
    raw, head = make_chunk(6, 203, dtype, ("bias", "softcap", "scale"))
    ids = torch.randint(-3, 206, (6, k), device=DEVICE)  # empty slots and repeats among them
    ours = state_of(kernels, raw, head, ids, pieces=3)
    theirs = state_of(definition, raw.float(), head, ids)
    reference = state_of(definition, *in_float64(raw, head), ids)
    for a, t, r in zip(statistics(ours), statistics(theirs), statistics(reference), strict=True):
        assert_no_worse(a, t, r)
    dvalues, dtail = torch.randn(6, k, device=DEVICE), torch.randn(6, device=DEVICE)
    dtail[2] = 0.0
    exact, exact_head = in_float64(raw, head)
    tail = reference.tail()
    wide = (exact_head, reference.ids, dvalues.double(), tail, dtail.double())
    definition.gradient(exact, 0, *wide, exact)
    same = raw.to(torch.float32, copy=True)
    definition.gradient(same, 0, head, theirs.ids, dvalues, theirs.tail(), dtail, same)
    apart = torch.empty(6, 203, dtype=torch.bfloat16, device=DEVICE)
    kernels.gradient(raw, 0, head, ours.ids, dvalues, ours.tail(), dtail, apart)
    assert_no_worse(apart, same.to(apart.dtype), exact)
    kernels.gradient(raw, 0, head, ours.ids, dvalues, ours.tail(), dtail, raw)
    assert_no_worse(raw, same.to(dtype), exact)


@pytest.mark.parametrize("k", [4, 200])
def test_ties_across_blocks_and_pieces(kernels, k):
    raw, head = make_chunk(3, 401)
    raw.round_()
    ours = state_of(kernels, raw, head, k, pieces=3)  # above 128 PyTorch selects
    expected = raw.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ours.ids, expected.indices[:, :k])
    assert torch.equal(ours.values, expected.values[:, :k])


def test_rows_that_only_grow_evict_everything(kernels):
    raw, head = make_chunk(2, 150)
    raw.copy_(torch.linspace(-5, 5, 150, device=DEVICE))
    ours = state_of(kernels, raw, head, 7)
    assert ours.ids[0].tolist() == list(range(149, 142, -1))
    expected = raw[:, :143].double().logsumexp(1).float()
    torch.testing.assert_close(ours.tail(), expected, rtol=1e-6, atol=0)


def test_infinite_logits(kernels):
    raw, head = make_chunk(4, 97)
    raw[0] = -torch.inf
    raw[1, 5:] = -torch.inf
    raw[2, 3] = -torch.inf
    raw[3, 11] = torch.nan
    ours, theirs = (state_of(b, raw, head, 8) for b in (kernels, definition))
    assert torch.equal(ours.ids[:3], theirs.ids[:3])
    assert torch.equal(ours.values[:3], theirs.values[:3])
    torch.testing.assert_close(ours.tail()[:3], theirs.tail()[:3], rtol=1e-6, atol=0)
    assert ours.tail()[3].isnan()
    given = torch.tensor([[3, 4, -1]] * 4, device=DEVICE)
    ours, theirs = (state_of(b, raw, head, given) for b in (kernels, definition))
    torch.testing.assert_close(ours.values[:3], theirs.values[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.tail()[:3], theirs.tail()[:3], rtol=1e-6, atol=0)
    dvalues, dtail = torch.ones(4, 3, device=DEVICE), torch.ones(4, device=DEVICE)
    kernels.gradient(raw, 0, head, ours.ids, dvalues, ours.tail(), dtail, raw)
    assert raw[0].tolist() == [0.0] * 3 + [1.0] * 2 + [0.0] * 92
    assert raw[1, 5:].abs().max() == 0
    assert raw[3].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(), ("bias", "softcap")], ids=["plain", "all"])
def test_divergence(kernels, dtype, beta, options):
    raw, head = make_chunk(5, 131, dtype, options)
    teacher_raw, teacher_head = make_chunk(5, 131, dtype, ("scale",))
    upstream = torch.randn(5, device=DEVICE)
    upstream[3] = 0.0
    exact, exact_head = in_float64(raw, head)
    wide = (teacher_raw.double(), teacher_head, beta, upstream.double())
    reference = definition.divergence(exact, exact_head, *wide, exact)
    same = raw.to(torch.float32, copy=True)
    single = (teacher_raw.float(), teacher_head, beta, upstream)
    theirs = definition.divergence(same, head, *single, same)
    untouched = raw.clone()
    without = kernels.divergence(raw, head, teacher_raw, teacher_head, beta, None, raw)
    apart = torch.empty(5, 131, dtype=torch.bfloat16, device=DEVICE)
    kernels.divergence(raw, head, teacher_raw, teacher_head, beta, upstream, apart)
    assert torch.equal(raw, untouched)
    assert_no_worse(apart, same.to(apart.dtype), exact)
    loss = kernels.divergence(raw, head, teacher_raw, teacher_head, beta, upstream, raw)
    assert torch.equal(loss, without)
    assert_no_worse(loss, theirs, reference)
    assert_no_worse(raw, same.to(dtype), exact)
    assert raw[3].abs().max() == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_of_padded_and_masked_vocabularies(kernels, beta):
    """A token that one model cannot say costs what it does in PyTorch."""
    raw, head = make_chunk(3, 70)
    teacher_raw, teacher_head = make_chunk(3, 70)
    raw[:, 50:] = -torch.inf
    teacher_raw[:, 60:] = -torch.inf
    teacher_raw[2, 5] = -torch.inf
    same = raw.clone()
    upstream = torch.ones(3, device=DEVICE)
    teacher = (teacher_raw, teacher_head, beta, upstream)
    expected = definition.divergence(same, head, *teacher, same)
    actual = kernels.divergence(raw, head, *teacher, raw)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(raw[:2], same[:2], rtol=1e-4, atol=1e-6)


def test_no_rows(kernels):
    raw, head = make_chunk(0, 40)
    state = state_of(kernels, raw, head, 4)
    assert state.values.shape == (0, 4)
    assert kernels.divergence(raw, head, raw, head, 1.0, None, raw).shape == (0,)

"""The kernels for GPUs against the torch epilogues, on chunks that the driver does not make too.

The operator tests run the same kernels through the driver; here are 16-bit chunks, strided ones,
large K, empty slots and infinite logits. Off a GPU they run in Triton's interpreter and in the
emulator of tests/cuda_emulator. Where exp ends is tried on every backend, as C++ has its own.
"""

import pytest
import torch

from opd_kernels.backends import select_backend
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, RowGradient
from tests.device import DEVICE
from tests.epilogue_cases import assert_no_worse, in_float64, make_chunk, state_of, statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
definition = Epilogues()


@pytest.fixture
def kernels(gpu_backend):
    return select_backend(gpu_backend, DEVICE)


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
    wide = RowGradient(reference.ids, dvalues.double(), tail, dtail.double())
    definition.gradient(Chunk(exact, exact_head), wide, exact)
    same = raw.to(torch.float32, copy=True)
    single = RowGradient(theirs.ids, dvalues, theirs.tail(), dtail)
    definition.gradient(Chunk(same, head), single, same)
    apart = torch.empty(6, 203, dtype=torch.bfloat16, device=DEVICE)
    gradient = RowGradient(ours.ids, dvalues, ours.tail(), dtail)
    kernels.gradient(Chunk(raw, head), gradient, apart)
    assert_no_worse(apart, same.to(apart.dtype), exact)
    kernels.gradient(Chunk(raw, head), gradient, raw)
    assert_no_worse(raw, same.to(dtype), exact)


@pytest.mark.parametrize("k", [4, 200])
def test_ties_across_blocks_and_pieces(kernels, k):
    raw, head = make_chunk(3, 401)
    raw.round_()
    ours = state_of(kernels, raw, head, k, pieces=3)  # Triton leaves 200 to PyTorch
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
    gradient = RowGradient(ours.ids, dvalues, ours.tail(), dtail)
    kernels.gradient(Chunk(raw, head), gradient, raw)
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
    wide = (Chunk(teacher_raw.double(), teacher_head), beta, upstream.double())
    reference = definition.divergence(Chunk(exact, exact_head), *wide, exact)
    same = raw.to(torch.float32, copy=True)
    single = (Chunk(teacher_raw.float(), teacher_head), beta, upstream)
    theirs = definition.divergence(Chunk(same, head), *single, same)
    untouched = raw.clone()
    chunk, teacher = Chunk(raw, head), Chunk(teacher_raw, teacher_head)
    without = kernels.divergence(chunk, teacher, beta, None, raw)
    apart = torch.empty(5, 131, dtype=torch.bfloat16, device=DEVICE)
    kernels.divergence(chunk, teacher, beta, upstream, apart)
    assert torch.equal(raw, untouched)
    assert_no_worse(apart, same.to(apart.dtype), exact)
    loss = kernels.divergence(chunk, teacher, beta, upstream, raw)
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
    teacher = (Chunk(teacher_raw, teacher_head), beta, upstream)
    expected = definition.divergence(Chunk(same, head), *teacher, same)
    actual = kernels.divergence(Chunk(raw, head), *teacher, raw)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(raw[:2], same[:2], rtol=1e-4, atol=1e-6)


def test_no_rows(kernels):
    raw, head = make_chunk(0, 40)
    state = state_of(kernels, raw, head, 4)
    assert state.values.shape == (0, 4)
    chunk = Chunk(raw, head)
    assert kernels.divergence(chunk, chunk, 1.0, None, raw).shape == (0,)


def test_exp_ends_in_0_and_infinity(backend):
    """A logit above its tail, which no driver gives: no kernel may make a usual number of it."""
    logits = torch.cat([torch.linspace(-120, 88.3, 900), torch.tensor([88.73, 200.0, torch.inf])])
    raw, head = make_chunk(2, len(logits))
    raw.copy_(logits)
    ids = torch.full((2, 1), -1, device=DEVICE)
    dvalues, tail = torch.zeros(2, 1, device=DEVICE), torch.zeros(2, device=DEVICE)
    ours = select_backend(backend, DEVICE)
    ours.gradient(Chunk(raw, head), RowGradient(ids, dvalues, tail, tail + 1), raw)
    expected = logits.double().exp().float().to(DEVICE).expand_as(raw)
    finfo = torch.finfo(raw.dtype)  # GPUs round x * log2(e), which is up to 128
    torch.testing.assert_close(raw, expected, rtol=128 * finfo.eps, atol=finfo.tiny)

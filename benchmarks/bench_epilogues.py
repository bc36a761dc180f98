"""The epilogues of every backend on one chunk of logits, with pytest-benchmark (make bench).

A chunk is read and, for the gradients, written once: GB/s tells how far that is from the memory's.
"""

import pytest
import torch

from benchmarks.problems import logits_std
from opd_kernels import available_backends
from opd_kernels.backends import select_backend
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState

ROWS, VOCAB, K = 64, 49_152, 20


@pytest.fixture(params=available_backends())
def epilogues(request):
    return select_backend(request.param, torch.device("cpu"))


@pytest.fixture
def chunk():
    return logits_std(VOCAB) * torch.randn(ROWS, VOCAB)


@pytest.fixture
def head():
    return Head(torch.empty(VOCAB, 1), None, None, 1.0, 1.0, VOCAB)


def measure(benchmark, chunk, passes, function, *arguments):
    """Time function(a copy of the chunk, *arguments): some write to it."""

    def setup():
        return (chunk.clone(), *arguments), {}

    benchmark.pedantic(function, setup=setup, rounds=15, warmup_rounds=2)
    size = passes * chunk.numel() * chunk.element_size()
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 1)


def reduced(epilogues, chunk, head):
    state = RowState.for_topk(ROWS, K, False, like=chunk)
    epilogues.update(Chunk(chunk, head), state)
    return state


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_topk(benchmark, epilogues, chunk, head, entropy):
    def update(chunk):
        epilogues.update(Chunk(chunk, head), RowState.for_topk(ROWS, K, entropy, like=chunk))

    measure(benchmark, chunk, 1, update)


def test_gather(benchmark, epilogues, chunk, head):
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(ROWS)])

    def update(chunk):
        epilogues.update(Chunk(chunk, head), RowState.for_ids(ids, False, like=chunk))

    measure(benchmark, chunk, 1, update)


def test_gradient(benchmark, epilogues, chunk, head):
    state = reduced(epilogues, chunk, head)
    rows = RowGradient(state.ids, torch.randn(ROWS, K), state.tail(), torch.randn(ROWS))
    measure(benchmark, chunk, 2, lambda c: epilogues.gradient(Chunk(c, head), rows, c))


def test_filtered_gradient(benchmark, epilogues, chunk, head):
    state = reduced(epilogues, chunk, head)
    threshold = chunk.logsumexp(-1) - 14 * torch.tensor(2.0).log()
    rows = RowGradient(state.ids, torch.randn(ROWS, K), state.tail(), torch.randn(ROWS))

    def filtered_gradient(raw):
        epilogues.filtered_gradient(Chunk(raw, head), rows, threshold)

    measure(benchmark, chunk, 1, filtered_gradient)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_full_divergence(benchmark, epilogues, chunk, head, beta):
    teacher = (Chunk(chunk + torch.randn_like(chunk), head), beta, torch.ones(ROWS))
    measure(benchmark, chunk, 3, lambda c: epilogues.divergence(Chunk(c, head), *teacher, c))

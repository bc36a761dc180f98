"""Time the epilogues of every backend on one chunk of logits (make bench).

GB/s counts each read and each write of the chunk once; compare it with the memory's bandwidth.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.problems import logits_std
from opd_kernels import available_backends
from opd_kernels.backends import Epilogues, select_backend
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState

ROWS, VOCAB, K = 64, 49_152, 20


@pytest.fixture(params=available_backends())
def epilogues(request: pytest.FixtureRequest) -> Epilogues:
    return select_backend(request.param, torch.device("cpu"))


@pytest.fixture
def chunk() -> Tensor:
    return logits_std(VOCAB) * torch.randn(ROWS, VOCAB)


@pytest.fixture
def head() -> Head:
    return Head(torch.empty(VOCAB, 1), None, None, 1.0, 1.0, VOCAB)


def measure(
    benchmark: Any, chunk: Tensor, passes: int, function: Callable[[Tensor], object]
) -> None:
    """Time function(chunk) on copies of the chunk, since some functions write to it.

    Args:
        passes: how often the function reads or writes a chunk.
    """

    def setup() -> tuple[tuple[Tensor], dict[str, Any]]:
        return (chunk.clone(),), {}

    benchmark.pedantic(function, setup=setup, rounds=15, warmup_rounds=2)
    size = passes * chunk.numel() * chunk.element_size()
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 1)


def reduced(epilogues: Epilogues, chunk: Tensor, head: Head) -> RowState:
    state = RowState.for_topk(ROWS, K, False, like=chunk)
    epilogues.update(Chunk(chunk, head), state)
    return state


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_topk(
    benchmark: Any, epilogues: Epilogues, chunk: Tensor, head: Head, entropy: bool
) -> None:
    def update(chunk: Tensor) -> None:
        epilogues.update(Chunk(chunk, head), RowState.for_topk(ROWS, K, entropy, like=chunk))

    measure(benchmark, chunk, 1, update)


def test_gather(benchmark: Any, epilogues: Epilogues, chunk: Tensor, head: Head) -> None:
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(ROWS)])

    def update(chunk: Tensor) -> None:
        epilogues.update(Chunk(chunk, head), RowState.for_ids(ids, False, like=chunk))

    measure(benchmark, chunk, 1, update)


def test_gradient(benchmark: Any, epilogues: Epilogues, chunk: Tensor, head: Head) -> None:
    state = reduced(epilogues, chunk, head)
    rows = RowGradient(state.ids, torch.randn(ROWS, K), state.tail(), torch.randn(ROWS))
    measure(benchmark, chunk, 2, lambda c: epilogues.gradient(Chunk(c, head), rows, c))


def test_filtered_gradient(benchmark: Any, epilogues: Epilogues, chunk: Tensor, head: Head) -> None:
    state = reduced(epilogues, chunk, head)
    threshold = chunk.logsumexp(-1) - 14 * torch.tensor(2.0).log()
    rows = RowGradient(state.ids, torch.randn(ROWS, K), state.tail(), torch.randn(ROWS))

    def filtered_gradient(raw: Tensor) -> None:
        epilogues.filtered_gradient(Chunk(raw, head), rows, threshold)

    measure(benchmark, chunk, 1, filtered_gradient)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_full_divergence(
    benchmark: Any, epilogues: Epilogues, chunk: Tensor, head: Head, beta: float
) -> None:
    teacher = (Chunk(chunk + torch.randn_like(chunk), head), beta, torch.ones(ROWS))
    measure(benchmark, chunk, 3, lambda c: epilogues.divergence(Chunk(c, head), *teacher, c))

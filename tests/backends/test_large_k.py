"""The C++ backend selects any K by its own kernel, in any number of chunks."""

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, available_backends
from opd_kernels.backends.epilogues import Epilogues
from tests.reference import outside_lse, sorted_by_logit

needs_cpu = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the C++ backend is not built"
)


@needs_cpu
@pytest.mark.parametrize("k", [1, 1024, 1025, 3000, 6000])
@pytest.mark.parametrize("has_ties", [True, False])
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_a_selection_of_any_size_does_not_fall_back(monkeypatch, k, has_ties, order, chunk_bytes):
    """With weights of one column the logits are given, and chunks have 4,096 columns at least."""
    vocab = 9000
    logits = torch.randn(vocab)
    if order != "random":
        logits = logits.sort(descending=order == "descending").values
    if has_ties:
        logits = (logits * 3).round()
    logits[::7] = -torch.inf if k == 6000 else logits[::7]

    def refuse(*arguments):
        raise AssertionError("PyTorch selected")

    monkeypatch.setattr(Epilogues, "update", refuse)
    student = LazyLogits(torch.ones(3, 1), torch.zeros(vocab, 1), bias=logits)
    s = student.topk(k, chunk_bytes=chunk_bytes, backend="cpu")
    ids = sorted_by_logit(logits, k)
    assert torch.equal(s.ids, ids.expand(3, k))
    assert torch.equal(s.values, logits[ids].expand(3, k))
    assert_close(s.tail.double(), outside_lse(logits.double(), ids).expand(3))

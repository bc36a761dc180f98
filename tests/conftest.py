"""Fixtures of all tests: fixed seeds, poisoned uninitialised memory, and the backends to try."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from opd_kernels import available_backends


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # torch.empty is filled with NaN, so that a result that reads unwritten memory shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=available_backends())
def backend(request):
    """Every installed backend; the operator tests run on each."""
    return request.param

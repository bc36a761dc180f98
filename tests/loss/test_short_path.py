"""The way of the data through the package: files that a loss enters, and Python calls it makes."""

import sys
from pathlib import Path

import pytest
import torch

import opd_kernels
from opd_kernels import LazyLogits, available_backends, distillation_loss

PACKAGE = Path(opd_kernels.__file__).parent
MOST_FILES, MOST_CALLS = 16, 300  # before they were counted: 31 files and 860 calls


def entered(run):
    """The package's files that a call enters, and the number of all Python calls, PyTorch's too."""
    files, calls = set(), 0

    def count(frame, event, _):
        nonlocal calls
        if event == "call":
            calls += 1
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                files.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return files, calls


@pytest.mark.skipif("cpu" not in available_backends(), reason="the C++ backend is not built")
@pytest.mark.parametrize("method", ["auto", "one_pass", "recompute"])
@pytest.mark.parametrize("leading", [(8,), (2, 4)], ids=["tokens", "sequences"])
def test_a_loss_and_its_backward_are_a_short_path(method, leading):
    def operands(requires_grad):
        return [torch.randn(*s, 16, requires_grad=requires_grad) for s in (leading, (50,))]

    def run():
        distillation_loss(student, teacher, k=5, method=method).loss.backward()

    for _ in range(2):  # the first call plans chunks, and what it finds is kept
        student, teacher = LazyLogits(*operands(True)), LazyLogits(*operands(False))
        files, calls = entered(run)
    assert len(files) <= MOST_FILES, sorted(files)
    assert calls <= MOST_CALLS, calls

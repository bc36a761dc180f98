"""Lazy zeros are ordinary tensors of zeros, and take memory only where they are written."""

from pathlib import Path

import pytest
import torch

from opd_kernels.lazy_zeros import lazy_zeros_like


@pytest.mark.parametrize("rows", [0, 7, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_to_zeros_of_the_same_layout(rows, dtype):
    for like in (torch.ones(rows, 3), torch.ones(3, rows).t()):
        zeros = lazy_zeros_like(like, dtype)
        assert zeros.dtype == dtype
        assert zeros.stride() == torch.zeros_like(like).stride()
        assert torch.equal(zeros, torch.zeros(rows, 3, dtype=dtype))
        assert torch.equal(zeros.add_(1), torch.ones(rows, 3, dtype=dtype))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_untouched_rows_take_no_memory_and_writes_are_private():
    before = resident()
    zeros = lazy_zeros_like(torch.empty(1 << 16, 1 << 10), torch.float32)
    zeros[::1000] += 1
    assert resident() - before < 32 << 20  # of 256 MiB
    other = lazy_zeros_like(torch.empty(1 << 16, 1 << 10), torch.float32)
    assert other.sum() == 0
    assert zeros.sum() == 66 * 1024

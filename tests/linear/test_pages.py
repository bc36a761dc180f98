"""Tensors in mapped memory behave like ordinary ones; zeros take memory only where written."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from opd_kernels import distillation_loss
from opd_kernels.linear import pages
from opd_kernels.linear.pages import PagedTensor
from tests.distill_cases import K, pair
from tests.reference import gradients


@pytest.mark.parametrize("rows", [0, 7, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_to_zeros_of_the_same_layout(rows, dtype):
    for like in (torch.ones(rows, 3), torch.ones(3, rows).t()):
        zeros = PagedTensor.zeros_like(like, dtype).tensor
        assert zeros.dtype == dtype
        assert zeros.stride() == torch.zeros_like(like).stride()
        assert torch.equal(zeros, torch.zeros(rows, 3, dtype=dtype))
        assert torch.equal(zeros.add_(1), torch.ones(rows, 3, dtype=dtype))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_untouched_rows_take_no_memory_and_writes_are_private():
    if "[always]" in HUGE_PAGES.read_text():
        pytest.skip("huge pages are always on, so that every written row takes one")
    before = resident_bytes()
    zeros = PagedTensor.zeros_like(torch.empty(1 << 16, 1 << 10), torch.float32).tensor
    zeros[::1000] += 1
    assert resident_bytes() - before < 32 << 20  # of 256 MiB
    other = PagedTensor.zeros_like(torch.empty(1 << 16, 1 << 10), torch.float32).tensor
    assert other.sum() == 0
    assert zeros.sum() == 66 * 1024


@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 7, 87_382, 300_001, 700_000])
def test_rounded_as_pytorch_rounds(rows, wide, narrow):
    """Sizes below and above the first part, with and without a partial last page."""
    values = torch.randn(rows, 3, dtype=wide)
    for like in (values, values.t()):
        sum_ = PagedTensor.zeros_like(like, wide)
        sum_.tensor += like
        rounded = sum_.rounded(narrow)
        assert rounded.dtype == narrow
        assert rounded.stride() == like.stride()
        assert torch.equal(rounded, like.to(narrow))
        assert rounded.untyped_storage().nbytes() == rounded.nbytes


def test_a_sum_gives_back_the_memory_that_rounding_saves():
    like = torch.empty(1 << 16, 1 << 10)
    before = resident_bytes()
    sum_ = PagedTensor.zeros_like(like, torch.float32)
    sum_.tensor += 1
    whole = resident_bytes() - before
    rounded = sum_.rounded(torch.bfloat16)
    del sum_
    assert whole > 255 << 20
    assert 126 << 20 < resident_bytes() - before < 136 << 20
    assert rounded.sum(dtype=torch.float32) == 1 << 26


def test_pages_that_are_locked_stay():
    paged = PagedTensor.zeros_like(torch.empty(1 << 19), torch.float32)
    paged.tensor += 1
    address, size = paged.tensor.data_ptr(), paged.tensor.nbytes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        pytest.skip("this system does not allow locking pages")
    assert paged.pages is not None
    with pytest.raises(OSError, match="Invalid argument"):
        paged.pages.madvise(mmap.MADV_DONTNEED)
    assert paged.rounded(torch.bfloat16).sum(dtype=torch.float32) == 1 << 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("huge", [0, 1 << 21])
@pytest.mark.parametrize("shape", [(0, 5), (3, 7), (1000, 3000), (5_000_003,)])
def test_an_empty_tensor_is_an_ordinary_one(shape, huge, dtype, monkeypatch):
    monkeypatch.setattr("opd_kernels.linear.pages._huge_page_bytes", lambda: huge)
    tensor = pages.empty(shape, torch.empty(0), dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert torch.equal(tensor.fill_(1), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("method", ["one_pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_on_pages_is_the_same(method, dtype, monkeypatch):
    """The loss does not depend on the size of the pages or on their initial contents."""
    student, teacher = pair(dtype=dtype)

    def run():
        loss = distillation_loss(student, teacher, k=K, method=method, chunk_bytes=1000).loss
        return [loss, *gradients(loss, student)]

    expected, mapped = run(), []
    monkeypatch.setattr("opd_kernels.linear.pages._MIN_HUGE_BYTES", 1)
    monkeypatch.setattr("opd_kernels.linear.pages._huge_page_bytes", lambda: 1)
    map_pages = pages._map_pages
    monkeypatch.setattr(pages, "_map_pages", lambda size: mapped.append(size) or map_pages(size))
    for one, other in zip(run(), expected, strict=True):
        assert torch.equal(one, other)
    assert mapped


def test_uninitialised_pages_are_poisoned():
    assert pages.empty((3 << 20,), torch.empty(0), torch.float32).isnan().all()


def test_memory_that_the_system_refuses_is_pytorchs_to_refuse():
    with pytest.raises(RuntimeError, match="allocate memory"):
        pages.empty((1 << 50,), torch.empty(0), torch.float32)


@pytest.mark.skipif(
    not pages._huge_page_bytes(), reason="without huge pages the C library keeps freed chunks"
)
def test_freed_chunks_are_given_back():
    """Small allocations in between do not keep them: in a heap the freed holes would add up."""
    pages.empty((6 << 20,), torch.empty(0), torch.float32).zero_()  # starts PyTorch's threads
    before, kept = resident_bytes(), []
    for _ in range(8):
        chunk = pages.empty((6 << 20,), torch.empty(0), torch.float32).zero_()
        assert resident_bytes() - before < 28 << 20  # one chunk has 24 MiB
        kept.append(torch.zeros(1000))
        del chunk
    assert resident_bytes() - before < 4 << 20

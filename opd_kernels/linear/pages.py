"""Tensors on fresh pages of the operating system, which become memory when they are written.

The C library keeps what is freed below 32 MiB for itself, and a hole that is a few bytes too small
for the next chunk stays memory: three chunks of 24 MiB were resident where one is in use. Linux
gives huge pages to who asks, in which 24 MiB come in in 0.7 ms instead of 10. Larger chunks are
given back anyway, and a virtual machine may come by their huge pages slowly (docs/log.md).
"""

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import deterministic

# Rows of a chunk that start at a multiple of a vector's size multiply up to a quarter faster.
ALIGNMENT = 64
_LEAST_BYTES = 1 << 20
_LEAST_HUGE_BYTES, _GIVEN_BACK_BYTES = 8 << 20, 32 << 20
_FIRST_ELEMENTS = 1 << 18  # of a rounded sum, over a temporary; what follows doubles


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor beside `like`. One of 8 to 32 MiB on a CPU lies on huge pages of its
    own, if there are any: it comes in fast, and is given back when it is freed, as larger ones are.
    """
    count, huge = math.prod(shape), _huge_page_bytes()
    size, pages = count * dtype.itemsize, None
    kept = max(huge, _LEAST_HUGE_BYTES) <= size < _GIVEN_BACK_BYTES
    if like.device.type == "cpu" and huge and kept:
        pages = _fresh(-(-size // huge) * huge)  # Linux aligns whole huge pages alone
    if pages is None:
        return like.new_empty(shape, dtype=dtype)
    with suppress(OSError):  # it is a hint
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
    # A property that PyTorch gives the module as it is imported, which mypy cannot see.
    filled: bool = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if filled and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(math.nan)  # as PyTorch does to its own
    return tensor


def empty_chunk(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised chunk [rows, columns] whose rows start at multiples of ALIGNMENT."""
    return empty((rows, aligned(columns)), like, dtype)[:, :columns]


def aligned(columns: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


@dataclass
class PagedTensor:
    """A tensor and the pages that it lies on, or None if it is an ordinary one."""

    tensor: Tensor
    pages: mmap.mmap | None = None

    @classmethod
    def zeros_like(cls, tensor: Tensor, dtype: torch.dtype) -> "PagedTensor":
        """Zeros that cost nothing until they are touched.

        A gradient [V, D] of which few rows are not zero would else spend nearly all of its time on
        being filled; and where all are written, huge pages came in no faster (docs/log.md).
        """
        size = tensor.numel() * dtype.itemsize
        on_cpu = tensor.device.type == "cpu" and tensor.is_contiguous()
        pages = _fresh(size) if on_cpu and size >= _LEAST_BYTES else None
        if pages is None:
            return cls(torch.zeros_like(tensor, dtype=dtype))
        return cls(torch.frombuffer(pages, dtype=dtype).view(tensor.shape), pages)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The tensor in dtype; it is used up. A narrower dtype takes the front of the same pages,
        and the rest of them go back to the system: new memory would take several times as long to
        come in as the values take to be rounded, and stand beside the sum meanwhile.
        """
        pages = self.pages
        if pages is None or 2 * dtype.itemsize > self.tensor.element_size():
            return self.tensor.to(dtype)
        wide = self.tensor.view(-1)
        narrow = torch.frombuffer(pages, dtype=dtype, count=wide.numel())
        done = min(_FIRST_ELEMENTS, wide.numel())
        narrow[:done] = wide[:done].clone()
        while done < wide.numel():  # as far as what was read already lies
            part = slice(done, min(2 * done, wide.numel()))
            narrow[part] = wide[part]
            done = part.stop
        end = -(-narrow.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and end < len(pages):
            with suppress(OSError):  # pages that are locked stay
                pages.madvise(mmap.MADV_DONTNEED, end)
        return narrow.view(self.tensor.shape)


def _fresh(size: int) -> mmap.mmap | None:
    """Pages of our own; None where PyTorch has to find the memory, or to say that there is none."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    with suppress(OSError):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return None


@cache
def _huge_page_bytes() -> int:
    """The size of a huge page where Linux gives them to a program that asks, else 0."""
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    with suppress(OSError):
        if hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in (settings / "enabled").read_text():
            return int((settings / "hpage_pmd_size").read_text())
    return 0

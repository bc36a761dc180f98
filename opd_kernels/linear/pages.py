"""Tensors in memory mapped directly from the operating system, which is zero and takes no physical
memory until it is written.

The C library keeps freed blocks below 32 MiB in its heap. A freed chunk of logits that is a few
bytes too small for the next one stays resident: with one chunk of 24 MiB in use, three were
resident. So `empty` maps chunks of 8 to 32 MiB itself, and freeing them returns their memory. The
first write to fresh memory is slow, since the kernel maps it page by page: 10 ms for 24 MiB. With
transparent huge pages, which a program must request on most systems, it takes 0.7 ms. The C library
maps larger chunks itself. They get no huge pages, which a virtual machine may provide slowly
(docs/log.md).
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
_MIN_ZEROS_BYTES = 1 << 20  # smaller tensors of zeros are ordinary ones
_MIN_HUGE_BYTES = 8 << 20  # smaller empty tensors are ordinary ones
_MAX_HEAP_BYTES = 32 << 20  # the C library maps larger blocks itself
_FIRST_ELEMENTS = 1 << 18  # size of the first part that `rounded` converts


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the device of `like`. On a CPU with huge pages, one of 8 to
    32 MiB gets huge pages of its own: the first write is fast, and freeing it returns the memory.
    """
    count, huge = math.prod(shape), _huge_page_bytes()
    size, pages = count * dtype.itemsize, None
    heap_keeps_it = max(huge, _MIN_HUGE_BYTES) <= size < _MAX_HEAP_BYTES
    if like.device.type == "cpu" and huge and heap_keeps_it:
        # Linux aligns a mapping to huge pages only if its size is a multiple of theirs.
        pages = _map_pages(-(-size // huge) * huge)
    if pages is None:
        return like.new_empty(shape, dtype=dtype)
    with suppress(OSError):  # huge pages are a hint: without them the tensor works as well
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
    # PyTorch adds this property to the module when it is imported, so mypy does not know it.
    poisons: bool = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisons and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(math.nan)  # as PyTorch fills its own uninitialised memory
    return tensor


def empty_chunk(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised chunk [rows, columns] whose rows start at multiples of ALIGNMENT."""
    return empty((rows, aligned(columns)), like, dtype)[:, :columns]


def aligned(columns: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


@dataclass
class PagedTensor:
    """A tensor and the memory mapping that holds it; `pages` is None for an ordinary tensor."""

    tensor: Tensor
    pages: mmap.mmap | None = None

    @classmethod
    def zeros_like(cls, tensor: Tensor, dtype: torch.dtype) -> "PagedTensor":
        """Return zeros that take neither time nor memory until they are written.

        Filling a gradient [V, D] with zeros would take nearly all of its time if only few rows are
        written. Huge pages are not requested: they were no faster even if all rows are written
        (docs/log.md).
        """
        size = tensor.numel() * dtype.itemsize
        is_mappable = tensor.device.type == "cpu" and tensor.is_contiguous()
        pages = _map_pages(size) if is_mappable and size >= _MIN_ZEROS_BYTES else None
        if pages is None:
            return cls(torch.zeros_like(tensor, dtype=dtype))
        return cls(torch.frombuffer(pages, dtype=dtype).view(tensor.shape), pages)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor rounded to dtype; this one must not be used afterwards.

        A dtype of at most half the size is written to the front of the same pages, and the rest of
        them is returned to the system. A new tensor would raise the peak by its size, and its first
        write would take several times as long as the rounding.
        """
        pages = self.pages
        if pages is None or 2 * dtype.itemsize > self.tensor.element_size():
            return self.tensor.to(dtype)
        wide = self.tensor.view(-1)
        narrow = torch.frombuffer(pages, dtype=dtype, count=wide.numel())
        done = min(_FIRST_ELEMENTS, wide.numel())
        narrow[:done] = wide[:done].clone()
        # A narrow element is at most half as wide, so 2 * done of them fit where `done` wide ones
        # were: every later part may be as long as all parts before it without overwriting itself.
        while done < wide.numel():
            part = slice(done, min(2 * done, wide.numel()))
            narrow[part] = wide[part]
            done = part.stop
        end = -(-narrow.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and end < len(pages):
            with suppress(OSError):  # locked pages cannot be returned
                pages.madvise(mmap.MADV_DONTNEED, end)
        return narrow.view(self.tensor.shape)


def _map_pages(size: int) -> mmap.mmap | None:
    """Map anonymous private memory. Return None if the system cannot: the caller then lets PyTorch
    allocate, which raises its own error if there is no memory.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    with suppress(OSError):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return None


@cache
def _huge_page_bytes() -> int:
    """Return the size of a transparent huge page, or 0 if Linux does not provide them."""
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    with suppress(OSError):
        if hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in (settings / "enabled").read_text():
            return int((settings / "hpage_pmd_size").read_text())
    return 0

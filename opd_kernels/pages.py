"""Tensors on fresh pages of the operating system, which become memory when they are written."""

import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20
_FIRST_ELEMENTS = 1 << 18  # of a rounded sum, over a temporary; what follows doubles


@dataclass
class PagedTensor:
    """A tensor and the pages that it lies on, or None if it is an ordinary one."""

    tensor: Tensor
    pages: mmap.mmap | None = None

    @classmethod
    def zeros_like(cls, tensor: Tensor, dtype: torch.dtype) -> "PagedTensor":
        """Zeros that cost nothing until they are touched.

        A gradient [V, D] of which few rows are not zero would else spend nearly all of its time on
        being filled (docs/log.md).
        """
        size = tensor.numel() * dtype.itemsize
        on_cpu = tensor.device.type == "cpu" and tensor.is_contiguous()
        if not on_cpu or size < _LEAST_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
            return cls(torch.zeros_like(tensor, dtype=dtype))
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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

"""Where the support S comes from: puts student and teacher on the same ids."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.sparse_logits import SparseLogits

Support = Literal["student", "teacher", "union", "intersection", "full"]
Missing = Literal["error", "drop"]


class Source(Protocol):
    """Anything that can put rows of logits on a support."""

    def topk(self, k: int) -> SparseLogits: ...

    def gather(self, ids: Tensor) -> SparseLogits: ...


@dataclass(frozen=True)
class Recomputed:
    """Logits that are computed from the hidden states at each request."""

    logits: LazyLogits
    entropy: bool
    chunk_bytes: int | None
    backend: str

    def topk(self, k: int) -> SparseLogits:
        return self.logits.topk(
            k, entropy=self.entropy, chunk_bytes=self.chunk_bytes, backend=self.backend
        )

    def gather(self, ids: Tensor) -> SparseLogits:
        return self.logits.gather(
            ids, entropy=self.entropy, chunk_bytes=self.chunk_bytes, backend=self.backend
        )


@dataclass(frozen=True)
class Served:
    """A server's answer: it has values at its own ids only."""

    answer: SparseLogits

    def topk(self, k: int) -> SparseLogits:
        if k >= self.answer.ids.shape[-1]:
            return self.answer
        best = self.answer.values.topk(k, dim=-1).indices
        return self.answer.at(self.answer.ids.gather(-1, best))

    def gather(self, ids: Tensor) -> SparseLogits:
        return self.answer.at(ids)


def align(
    student: Source, teacher: Source, support: str | Tensor, k: int, missing: str
) -> tuple[SparseLogits, SparseLogits]:
    """Student and teacher on the same ids, in that order.

    "union" costs each model a second pass: its tail cannot be recovered from the top-K's by
    subtraction. "intersection" costs none: the slots that are left out join the tail.

    Raises:
        ValueError: missing="error" and a served teacher lacks a value that the support needs.
    """
    if isinstance(support, Tensor):
        s, t = student.gather(support), teacher.gather(support)
    elif support == "student":
        s = student.topk(k)
        t = teacher.gather(s.ids)
    elif support == "teacher":
        t = teacher.topk(k)
        s = student.gather(t.ids)
    elif support == "union":
        with torch.no_grad():
            ids = torch.cat([student.topk(k).ids, teacher.topk(k).ids], dim=-1)
        s, t = student.gather(ids), teacher.gather(ids)
    else:
        s = student.topk(k)
        t = teacher.topk(k).at(s.ids)
        s = s.keep(t.values != -torch.inf)
    if isinstance(teacher, Served):
        s = _resolve_missing(s, t, missing)
    return s, t


def _resolve_missing(student: SparseLogits, teacher: SparseLogits, missing: str) -> SparseLogits:
    absent = student.values > -torch.inf  # and not NaN, which is not the server's fault
    absent &= teacher.values == -torch.inf
    if missing == "error" and absent.any():
        raise ValueError(
            f"teacher: no value for {int(absent.sum())} of the support's {absent.numel()} slots, "
            "since its server returned other ids; pass missing='drop' to leave those slots out "
            "of S, or support='teacher' or 'intersection'"
        )
    return student.keep(~absent)

"""The support S: which ids it holds, and both models on them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opd_kernels.linear.operators import FlatLogits
from opd_kernels.loss.options import LossOptions
from opd_kernels.sparse_logits import SparseLogits


class Source(Protocol):
    """Rows of logits that can be reduced to SparseLogits."""

    def reduce(self, wanted: int | Tensor) -> SparseLogits:
        """The top-K of each row for wanted = K, or the logits at wanted = ids [N, K]."""
        ...


@dataclass(frozen=True)
class Recomputed:
    """Logits that are computed from the hidden states at each request."""

    logits: FlatLogits
    options: LossOptions

    def reduce(self, wanted: int | Tensor) -> SparseLogits:
        options = self.options
        execution = (options.entropy, options.chunk_bytes, options.backend)
        if isinstance(wanted, Tensor):
            return self.logits.gather(wanted, *execution)
        return self.logits.topk(wanted, *execution)


@dataclass(frozen=True)
class Served:
    """A server's answer: it has values at its own ids only."""

    answer: SparseLogits

    def reduce(self, wanted: int | Tensor) -> SparseLogits:
        if isinstance(wanted, Tensor):
            return self.answer.at(wanted)
        return self.answer.topk(wanted)


def source_of(logits: FlatLogits | SparseLogits, options: LossOptions) -> Recomputed | Served:
    """The source of a model that is recomputed or was served."""
    if isinstance(logits, SparseLogits):
        return Served(logits)
    return Recomputed(logits, options)


def select_support(
    student: Source, teacher: Source, support: str | Tensor, k: int
) -> tuple[int | Tensor, SparseLogits | None]:
    """Return K or the ids [N, K] to reduce the student to, and the teacher on S if it is known.

    "union" costs each model a second pass: its tail cannot be recovered from the top-K's by
    subtraction. "intersection" costs none: the slots that are left out join the tail.
    """
    if isinstance(support, Tensor):
        return support, None
    if support == "teacher":
        answer = teacher.reduce(k)
        return answer.ids, answer
    if support == "union":
        with torch.no_grad():  # of the student's pass only the ids are wanted
            return torch.cat([student.reduce(k).ids, teacher.reduce(k).ids], dim=-1), None
    return k, None


def align_teacher(
    student: SparseLogits,
    answer: SparseLogits | None,
    teacher: Source,
    support: str | Tensor,
    options: LossOptions,
) -> tuple[SparseLogits, SparseLogits]:
    """Student and teacher on the same ids.

    Args:
        student: reduced to what select_support says.
        answer: the teacher as select_support returns it.
        teacher: where the teacher's values come from if there is no answer.
        support: a name, or ids [N, K].
        options: k, and what to do where a served teacher has no value.

    Raises:
        ValueError: missing="error" and a served teacher lacks a value that the support needs.
    """
    in_both = isinstance(support, str) and support == "intersection"
    if answer is None:
        if in_both:
            answer = teacher.reduce(options.k).at(student.ids)
        else:
            answer = teacher.reduce(student.ids)
    if in_both:
        student = student.keep(answer.values != -torch.inf)
    if isinstance(teacher, Served):
        student = _resolve_missing(student, answer, options.missing)
    return student, answer


def _resolve_missing(student: SparseLogits, teacher: SparseLogits, missing: str) -> SparseLogits:
    # The comparison excludes NaN of the student, which is not the server's fault.
    absent = (student.values > -torch.inf) & (teacher.values == -torch.inf)
    if missing == "error" and absent.any():
        raise ValueError(
            f"teacher: no value for {int(absent.sum())} of the support's {absent.numel()} slots, "
            "since its server returned other ids; pass missing='drop' to leave those slots out "
            "of S, or support='teacher' or 'intersection'"
        )
    return student.keep(~absent)

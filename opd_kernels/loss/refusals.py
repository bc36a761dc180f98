"""What distillation_loss refuses, before any work."""

from typing import get_args

import torch
from torch import Tensor

from opd_kernels.checks import check_device, check_number, got
from opd_kernels.divergences import check_same_distribution
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.objective import Objective, jsd_beta
from opd_kernels.loss.supports import Missing, Support
from opd_kernels.sparse_logits import SparseLogits


def check_arguments(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    support: Support | Tensor,
    objective: Objective,
    token_weights: Tensor | None,
    reduction: str,
    method: str,
    missing: str,
) -> None:
    """Raise for what no annotation can rule out; the message names the argument and the remedy."""
    if not isinstance(student, LazyLogits):
        raise TypeError(f"student: expected LazyLogits, got {type(student).__name__}")
    if not isinstance(teacher, (LazyLogits, SparseLogits)):
        raise TypeError(
            "teacher: expected LazyLogits, or SparseLogits from a server, got "
            f"{type(teacher).__name__}"
        )
    if not callable(objective):
        raise TypeError(
            "objective: expected a function (student, teacher) -> loss per token, got "
            f"{objective!r}; pass reverse_kl, or a functools.partial of it"
        )
    leading = student.hidden.shape[:-1]
    rows = teacher.hidden if isinstance(teacher, LazyLogits) else teacher.values
    check_device("teacher", rows, "student", student.hidden.device)
    theirs = rows.shape[:-1]
    if theirs != leading:
        raise ValueError(
            f"teacher: expected the student's leading shape {tuple(leading)}, got "
            f"{tuple(theirs)}; select the same completion tokens from both, for example "
            "student[mask] and teacher[teacher_mask]"
        )
    choices = {"reduction": (reduction, ("mean", "sum", "none")),
               "method": (method, ("auto", "one_pass", "recompute")),
               "missing": (missing, get_args(Missing))}  # fmt: skip
    if not isinstance(support, (str, Tensor)):
        raise TypeError(f"support: expected a name or a tensor of ids, got {got(support)}")
    if isinstance(support, str):
        choices["support"] = (support, get_args(Support))
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    if reduction == "none" and method == "one_pass":
        raise ValueError(
            "reduction: 'none' has a gradient only once the caller weighs the tokens, which "
            "one_pass cannot wait for; use method='recompute' or 'auto'"
        )
    if isinstance(support, str) and support == "full" and isinstance(teacher, SparseLogits):
        raise ValueError(
            "support: 'full' needs the teacher's whole distribution, got a server's SparseLogits; "
            "use support='teacher' with tail='bucket'"
        )
    if isinstance(teacher, SparseLogits):
        _check_answer(student, teacher)
    if token_weights is not None:
        if not isinstance(token_weights, Tensor) or token_weights.is_complex():
            raise TypeError(
                "token_weights: expected a real tensor, one weight for each token, got "
                f"{got(token_weights)}"
            )
        if token_weights.shape != leading:
            raise ValueError(
                f"token_weights: expected the leading shape {tuple(leading)}, got "
                f"{tuple(token_weights.shape)}"
            )
        check_device("token_weights", token_weights, "student", student.hidden.device)


def check_gradient_filter(
    gradient_filter: float | None, support: Support | Tensor, reduction: str, method: str
) -> None:
    """Raise unless the filter is a probability and the gradient has a part off S to filter."""
    if gradient_filter is None:
        return
    if not isinstance(gradient_filter, float) or not 0.0 < gradient_filter < 1.0:
        raise ValueError(
            "gradient_filter: expected a probability between 0 and 1 such as 2**-16, or None for "
            f"the exact gradient, got {gradient_filter!r}"
        )
    if method == "recompute" or reduction == "none":
        raise ValueError(
            "gradient_filter: only one_pass can filter, got "
            f"method={method!r}, reduction={reduction!r}; drop one"
        )
    if isinstance(support, str) and support == "full":
        raise ValueError(
            "gradient_filter: support='full' has no entries outside S to leave out; drop one"
        )


def check_shards(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    support: Support | Tensor,
    objective: Objective,
) -> None:
    """Raise for what whole rows cannot do where a head is vocabulary-parallel."""
    if isinstance(support, Tensor) or support != "full" or isinstance(teacher, SparseLogits):
        return
    ours, theirs = student.shard, teacher.shard
    if theirs is not None and (ours is None or not theirs.same_split_as(ours)):
        raise ValueError(
            "teacher: with support='full', expected a whole head or one that is split as the "
            "student's is; split them alike, or use a support of K ids"
        )
    if student.shard is None:
        return
    if jsd_beta(objective) is None or student.temperature != teacher.temperature:
        raise ValueError(
            "objective: with support='full' on a vocabulary-parallel head, expected reverse_kl, "
            "forward_kl or jsd, at one temperature, without tail='renormalize'; others need whole "
            "rows of logits: use a support of K ids"
        )


def _check_answer(student: LazyLogits, teacher: SparseLogits) -> None:
    """Raise unless a server's answer is of the student's distribution."""
    if teacher.ids.dtype != torch.int64:
        raise TypeError(
            f"teacher: expected int64 ids, got {teacher.ids.dtype}; make it by "
            "SparseLogits.from_log_probs"
        )
    check_same_distribution(student, teacher)


def check_denominator(denominator: float | Tensor | None, reduction: str) -> None:
    """Raise unless the denominator is one number that is not negative, for a mean. A tensor's is
    not looked at; of 0 the mean is 0.
    """
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"denominator: it belongs to reduction='mean', got {reduction!r}; drop one"
        )
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(
                f"denominator: expected one number, got shape {tuple(denominator.shape)}; weights "
                "of tokens are token_weights"
            )
        if denominator.is_complex() or denominator.is_meta:
            raise TypeError(
                f"denominator: expected a real number, got {denominator.dtype} on "
                f"{denominator.device}"
            )
        return
    if not isinstance(denominator, (int, float)) or isinstance(denominator, bool):
        raise TypeError(f"denominator: expected a number or a tensor, got {denominator!r}")
    check_number("denominator", denominator)
    if denominator < 0:
        raise ValueError(
            f"denominator: expected a number of tokens, or 0 for a mean of 0, got {denominator}"
        )

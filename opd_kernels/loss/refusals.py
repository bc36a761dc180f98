"""What distillation_loss refuses, before any work."""

import warnings
from typing import get_args

import torch
from torch import Tensor

from opd_kernels.checks import (
    check_device,
    check_execution,
    check_flags,
    check_ids,
    check_k,
    check_number,
    got,
)
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.objective import jsd_beta
from opd_kernels.loss.options import LossOptions, Missing, Support
from opd_kernels.sparse_logits import SparseLogits, check_same_distribution, have_same_temperature

# Heads are padded to a multiple of 8, for tensor cores, up to 128 times the ranks of a group.
_LEAST_MULTIPLE, _MOST_PADDING = 8, 1024
_CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "method": ("auto", "one_pass", "recompute"),
    "missing": get_args(Missing),
    "support": get_args(Support),
}


def check_models(student: LazyLogits, teacher: LazyLogits | SparseLogits) -> None:
    """Raise unless these are two models on the same tokens and device."""
    if not isinstance(student, LazyLogits):
        raise TypeError(f"student: expected LazyLogits, got {type(student).__name__}")
    if not isinstance(teacher, (LazyLogits, SparseLogits)):
        raise TypeError(
            "teacher: expected LazyLogits, or SparseLogits from a server, got "
            f"{type(teacher).__name__}"
        )
    leading = student.hidden.shape[:-1]
    rows = teacher.hidden if isinstance(teacher, LazyLogits) else teacher.values
    check_device("teacher", rows, "student", student.hidden.device)
    if rows.shape[:-1] != leading:
        raise ValueError(
            f"teacher: expected the student's leading shape {tuple(leading)}, got "
            f"{tuple(rows.shape[:-1])}; select the same completion tokens from both, for example "
            "student[mask] and teacher[teacher_mask]"
        )
    if isinstance(teacher, LazyLogits) and not torch.compiler.is_compiling():
        _warn_of_cut_tokens(student.head.vocab_size, teacher.head.vocab_size)


def _warn_of_cut_tokens(student_size: int, teacher_size: int) -> None:
    """Warn if the vocabularies differ by more than padding to a usual multiple explains."""
    small, large = sorted((student_size, teacher_size))
    if large - small >= _MOST_PADDING or (large > small and large % _LEAST_MULTIPLE):
        warnings.warn(
            f"teacher: expected the student's vocabulary of {student_size} tokens, or a padded "
            f"one, got {teacher_size}; the loss leaves out the ids from {small}. Pass "
            f"vocab_size={small} to the larger LazyLogits if these are padding",
            stacklevel=4,
        )


def check_loss(
    student: LazyLogits,
    teacher: LazyLogits | SparseLogits,
    options: LossOptions,
    token_weights: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    """Raise TypeError or ValueError for options that do not fit these models or one another."""
    _check_choices(options)
    check_flags(entropy=options.entropy, compact=options.compact)
    check_execution(options.chunk_bytes, options.backend)
    _check_gradient_filter(options)
    if options.full and isinstance(teacher, SparseLogits):
        raise ValueError(
            "support: 'full' needs the teacher's whole distribution, got a server's SparseLogits; "
            "use support='teacher' with tail='bucket'"
        )
    if isinstance(teacher, SparseLogits):
        _check_answer(student, teacher)
    if token_weights is not None:
        _check_token_weights(token_weights, student)
    _check_denominator(denominator, options.reduction)
    if options.full:
        assert isinstance(teacher, LazyLogits)
        _check_shards(student, teacher, options)


def check_support(student: LazyLogits, options: LossOptions, vocab_size: int) -> None:
    """Raise unless the ids fit the student, or k the vocabulary that both models share."""
    if isinstance(options.support, Tensor):
        check_ids(options.support, student.hidden)
    else:
        check_k(options.k, vocab_size)


def _check_choices(options: LossOptions) -> None:
    if not callable(options.objective):
        raise TypeError(
            "objective: expected a function (student, teacher) -> loss per token, got "
            f"{options.objective!r}; pass reverse_kl, or a functools.partial of it"
        )
    if not isinstance(options.support, (str, Tensor)):
        raise TypeError(f"support: expected a name or a tensor of ids, got {got(options.support)}")
    for name, allowed in _CHOICES.items():
        value = getattr(options, name)
        if name == "support" and isinstance(value, Tensor):
            continue
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    if options.reduction == "none" and options.method == "one_pass":
        raise ValueError(
            "reduction: 'none' has a gradient only once the caller weighs the tokens, which "
            "one_pass cannot wait for; use method='recompute' or 'auto'"
        )


def _check_gradient_filter(options: LossOptions) -> None:
    """Raise unless the filter is a probability and the gradient has a part off S to filter."""
    least = options.gradient_filter
    if least is None:
        return
    if not isinstance(least, float) or not 0.0 < least < 1.0:
        raise ValueError(
            "gradient_filter: expected a probability between 0 and 1 such as 2**-16, or None for "
            f"the exact gradient, got {least!r}"
        )
    if options.method == "recompute" or options.reduction == "none":
        raise ValueError(
            "gradient_filter: only one_pass can filter, got "
            f"method={options.method!r}, reduction={options.reduction!r}; drop one"
        )
    if options.full:
        raise ValueError(
            "gradient_filter: support='full' has no entries outside S to leave out; drop one"
        )


def _check_answer(student: LazyLogits, teacher: SparseLogits) -> None:
    """Raise unless a server's answer describes the student's vocabulary and temperature."""
    if teacher.ids.dtype != torch.int64:
        raise TypeError(
            f"teacher: expected int64 ids, got {teacher.ids.dtype}; make it by "
            "SparseLogits.from_log_probs"
        )
    check_same_distribution(student, teacher)


def _check_token_weights(token_weights: Tensor, student: LazyLogits) -> None:
    if not isinstance(token_weights, Tensor) or token_weights.is_complex():
        raise TypeError(
            "token_weights: expected a real tensor, one weight for each token, got "
            f"{got(token_weights)}"
        )
    leading = student.hidden.shape[:-1]
    if token_weights.shape != leading:
        raise ValueError(
            f"token_weights: expected the leading shape {tuple(leading)}, got "
            f"{tuple(token_weights.shape)}"
        )
    check_device("token_weights", token_weights, "student", student.hidden.device)
    _check_constant("token_weights", token_weights)


def _check_constant(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a gradient would be expected of a tensor that gets none."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires it; pass "
            f"{name}.detach(), or weigh the losses of reduction='none' yourself"
        )


def _check_denominator(denominator: float | Tensor | None, reduction: str) -> None:
    """Raise unless the denominator is one number for a mean, not negative.

    The number in a tensor is not looked at, since that would wait for the device.
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
        _check_constant("denominator", denominator)
        return
    if not isinstance(denominator, (int, float)) or isinstance(denominator, bool):
        raise TypeError(f"denominator: expected a number or a tensor, got {denominator!r}")
    check_number("denominator", denominator)
    if denominator < 0:
        raise ValueError(
            f"denominator: expected a number of tokens, or 0 for a mean of 0, got {denominator}"
        )


def _check_shards(student: LazyLogits, teacher: LazyLogits, options: LossOptions) -> None:
    """Raise for what support="full" cannot do where a head is vocabulary-parallel."""
    ours, theirs = student.shard, teacher.shard
    if theirs is not None and (ours is None or not theirs.same_split_as(ours)):
        raise ValueError(
            "teacher: with support='full', expected a whole head or one that is split as the "
            "student's is; split them alike, or use a support of K ids"
        )
    if ours is None:
        return
    if jsd_beta(options.objective) is None or not have_same_temperature(student, teacher):
        raise ValueError(
            "objective: with support='full' on a vocabulary-parallel head, expected reverse_kl, "
            "forward_kl or jsd, at one temperature, without tail='renormalize'; others need whole "
            "rows of logits: use a support of K ids"
        )

"""Objectives: pure functions of two SparseLogits on the same support, [..., K] -> [...] in nats.

Notation: p is the student, q the teacher, S the support, P and Q the mass of S under each,
c_k = log p_k - log q_k and m = sum_S p_k c_k. Gradients are with respect to the student's final
logits z; the teacher never gets a gradient. A slot of S is live if either model has a value there.
`tail` selects the treatment of the mass outside S:

    "drop"         the sum runs over S only; a KL is the generalised KL of p and q as measures on S,
                   which has the additional terms +-(p_k - q_k), is never negative, and is 0 only
                   at p = q on S
    "bucket"       the mass outside S is one more outcome, with probability exp(log_tail)
    "renormalize"  p and q are renormalised on S; a row has loss 0 if fewer than two slots are live,
                   or if p or q has no mass on S

Every divergence is smallest where p = q on the outcomes that it sees, except the reverse KL without
stop-gradient. docs/objectives.md lists the optimum of each combination.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_kernels.checks import check_beta, check_device, check_flags, got
from opd_kernels.sparse_logits import SparseLogits, check_same_distribution

Tail = Literal["drop", "bucket", "renormalize"]


def reverse_kl(
    student: SparseLogits, teacher: SparseLogits, *, stop_gradient: bool = True, tail: Tail = "drop"
) -> Tensor:
    """Reverse KL(p || q) on S: sum_S p_k c_k, with tail="drop" sum_S (p_k c_k - p_k + q_k).

    The gradient of the generalised KL is p_j (c_j [j in S] - m), which vanishes only at p = q on S.
    It equals the gradient of sum_S p_k (sg(log p_k) - log q_k), the top-K reverse KL with
    stop-gradient of arXiv 2605.11182. stop_gradient=False leaves out the terms q_k - p_k. The
    gradient then has the additional term p_j ([j in S] - P), which moves the student's mass out of
    S until p = q / e on S. With tail="bucket" or "renormalize" both losses are equal, since p and q
    have the same total.

    Args:
        student, teacher: SparseLogits [..., K] with the same ids, vocabulary and temperature.
        stop_gradient: whether the loss has the gradient with a detached log p. False gives the
            biased gradient of the cut sum.
        tail: treatment of the mass outside S: "drop", "bucket" or "renormalize".

    Returns:
        [...] the loss of each row.

    Raises:
        TypeError: student or teacher is not SparseLogits.
        ValueError: student and teacher do not match, tail is unknown, or tail="renormalize" with
            K = 1.
    """
    check_flags(stop_gradient=stop_gradient)
    bins = _bins(student, teacher, tail)
    terms = _expectation(bins.log_p, bins.log_p - bins.log_q)
    if tail == "drop" and stop_gradient:
        # Detaching log p would give the same gradient, but a wrong second derivative.
        terms = terms - bins.log_p.exp() + bins.log_q.exp()
    return bins.sum(terms)


def forward_kl(student: SparseLogits, teacher: SparseLogits, *, tail: Tail = "drop") -> Tensor:
    """Forward KL(q || p) on S: -sum_S q_k c_k, with tail="drop" sum_S (p_k - q_k - q_k c_k).

    The gradient of the generalised KL is [j in S] (p_j - q_j) - p_j (P - Q), which vanishes only at
    p = q on S. The cut sum -sum_S q_k c_k alone is smallest at P = 1: it would truncate the student
    to S.

    Args, Returns and Raises are those of reverse_kl.
    """
    bins = _bins(student, teacher, tail)
    terms = _expectation(bins.log_q, bins.log_q - bins.log_p)
    if tail == "drop":
        terms = terms - bins.log_q.exp() + bins.log_p.exp()
    return bins.sum(terms)


def jsd(
    student: SparseLogits, teacher: SparseLogits, *, beta: float = 0.5, tail: Tail = "drop"
) -> Tensor:
    """Generalised Jensen-Shannon divergence beta KL(q || M) + (1 - beta) KL(p || M).

    The mixture is M = (1 - beta) p + beta q. As in GKD (arXiv 2306.13649), beta = 0 is the forward
    KL and beta = 1 the reverse KL, the limits of the divergence divided by beta or 1 - beta. The
    gradient is p_j (w_j [j in S] - sum_S p_k w_k) with w = (1 - beta) log(p / M). It has no bias
    that a stop-gradient would have to remove.

    Args:
        beta: weight of the teacher in the mixture, 0 to 1.

    Other arguments, Returns and Raises are those of reverse_kl; beta outside [0, 1] raises
    ValueError.
    """
    check_beta("beta", beta)
    if beta == 0.0:
        return forward_kl(student, teacher, tail=tail)
    if beta == 1.0:
        return reverse_kl(student, teacher, tail=tail)
    bins = _bins(student, teacher, tail)
    log_m = torch.logaddexp(bins.log_p + math.log1p(-beta), bins.log_q + math.log(beta))
    from_teacher = _expectation(bins.log_q, bins.log_q - log_m)
    from_student = _expectation(bins.log_p, bins.log_p - log_m)
    return bins.sum(beta * from_teacher + (1.0 - beta) * from_student)


def policy_gradient(student: SparseLogits, teacher: SparseLogits) -> Tensor:
    """Score-function surrogate log p(y) * sg(log p(y) - log q(y)) for sampled tokens y, S = {y}.

    Its gradient is an unbiased estimate of the gradient of the token's full reverse KL, given the
    prefix, if y was sampled from p: at the same temperature and without top-p or top-k truncation
    (REINFORCE, Williams 1992). Its value is not a divergence. Backpropagating the log-ratio without
    the score function would have expected gradient 0.

    Args:
        student, teacher: SparseLogits with K = 1, gathered at the sampled ids.

    Returns:
        [...] the surrogate loss of each row, 0 where the slot is empty.

    Raises:
        TypeError: student or teacher is not SparseLogits.
        ValueError: K is not 1, or student and teacher do not match.
    """
    if isinstance(student, SparseLogits) and student.values.shape[-1] != 1:
        raise ValueError(
            "student: expected K = 1, the sampled token of each row, got K = "
            f"{student.values.shape[-1]}; pass the sampled ids as support"
        )
    bins = _bins(student, teacher, "drop")
    return bins.sum(bins.log_p * (bins.log_p - bins.log_q).detach())


@dataclass(frozen=True)
class _Bins:
    """Log-probabilities of two distributions over the same B outcomes: the slots of S, and perhaps
    the tail. Outcomes that are not live hold 0, since -inf - -inf would give NaN gradients.
    """

    log_p: Tensor  # [..., B]
    log_q: Tensor  # [..., B], detached
    live: Tensor  # [..., B] bool; terms of other outcomes do not count

    def sum(self, terms: Tensor) -> Tensor:
        """Sum terms [..., B] over the live outcomes: [...]."""
        return terms.masked_fill(~self.live, 0.0).sum(-1)


def _expectation(log_weight: Tensor, term: Tensor) -> Tensor:
    """Return exp(log_weight) * term. A weight of 0 times an infinite term is 0; NaN stays NaN."""
    weight = log_weight.exp()
    return weight * term.masked_fill((weight == 0) & ~term.isnan(), 0.0)


def _bins(student: SparseLogits, teacher: SparseLogits, tail: Tail) -> _Bins:
    if tail not in ("drop", "bucket", "renormalize"):
        raise ValueError(f"tail: expected 'drop', 'bucket' or 'renormalize', got {tail!r}")
    _check_pair(student, teacher)
    teacher = teacher.detach()
    if tail == "renormalize":
        return _renormalized(student.values, teacher.values)
    log_p, log_q = student.log_probs, teacher.log_probs
    if tail == "bucket":
        log_p = torch.cat([log_p, student.log_tail[..., None]], dim=-1)
        log_q = torch.cat([log_q, teacher.log_tail[..., None]], dim=-1)
    return _masked(log_p, log_q, (log_p != -torch.inf) | (log_q != -torch.inf))


def _masked(log_p: Tensor, log_q: Tensor, live: Tensor) -> _Bins:
    return _Bins(log_p.masked_fill(~live, 0.0), log_q.masked_fill(~live, 0.0), live)


def _renormalized(values_p: Tensor, values_q: Tensor) -> _Bins:
    if values_p.shape[-1] < 2:
        raise ValueError(
            "tail: 'renormalize' needs K >= 2, got K = 1: a single renormalised outcome has "
            "probability 1 and no gradient; use a larger K, or tail='bucket'"
        )
    has_p, has_q = values_p != -torch.inf, values_q != -torch.inf
    live = has_p | has_q
    live &= live.sum(-1, keepdim=True) >= 2
    both = has_p.any(-1, keepdim=True) & has_q.any(-1, keepdim=True)
    live &= both | (values_p.isnan() | values_q.isnan()).any(-1, keepdim=True)  # NaN stays NaN
    # Rows without a live slot get zeros, since the gradient of log_softmax at all -inf is NaN.
    has_live = live.any(-1, keepdim=True)
    log_p, log_q = (x.masked_fill(~has_live, 0.0).log_softmax(-1) for x in (values_p, values_q))
    return _masked(log_p, log_q, live)


def _check_pair(student: SparseLogits, teacher: SparseLogits) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, SparseLogits):
            raise TypeError(
                f"{name}: expected SparseLogits, got {got(model)}; call topk or gather on "
                "LazyLogits, or pass student and teacher to distillation_loss"
            )
    check_device("teacher", teacher.values, "student", student.values.device)
    check_same_distribution(student, teacher)
    if student.values.shape != teacher.values.shape:
        raise ValueError(
            f"teacher: expected the student's shape [..., K] = {tuple(student.values.shape)}, got "
            f"{tuple(teacher.values.shape)}; gather it at student.ids"
        )
    # Comparing ids makes the host wait for the device, so skip it where they are the same tensor.
    if student.ids is teacher.ids or torch.compiler.is_compiling():
        return
    if not torch.equal(student.ids, teacher.ids):
        raise ValueError(
            "teacher: expected its values at the student's ids, got other ids; use "
            "teacher.gather(student.ids), not its own topk"
        )

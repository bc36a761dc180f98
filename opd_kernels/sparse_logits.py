"""SparseLogits: a row of logits as K values, K ids and the logsumexp of the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_kernels.checks import (
    check_device,
    check_floating,
    check_int,
    check_temperature,
    check_token_ids,
    got,
)


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """The final logits of each row on a support S of K ids, and the logsumexp of all the others.

    LazyLogits.topk and LazyLogits.gather return it; `from_log_probs` makes it of a server's answer.
    An empty slot has the value -inf: its id is outside [0, vocab_size), repeats the id of an
    earlier slot, or has no mass.

    Attributes:
        values: [..., K] logits on S, float32 (float64 from float64 operands).
        ids: [..., K] int64 token ids.
        tail: [...] logsumexp of the logits outside S, -inf where S is everything; None from
            gather(tail=False).
        vocab_size: V, the number of tokens that the row's distribution covers.
        temperature: divisor that is already applied to the logits.
        entropy: [...] entropy of the whole row in nats, detached; None unless requested.
    """

    values: Tensor
    ids: Tensor
    tail: Tensor | None
    vocab_size: int
    temperature: float = 1.0
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        check_floating("values", self.values)
        if self.values.dim() < 1:
            raise ValueError("values: expected [..., K], got a scalar; add a dimension")
        _check_ids(self.ids, self.values)
        leading = self.values.shape[:-1]
        for name in ("tail", "entropy"):
            row = getattr(self, name)
            if row is None:
                continue
            check_floating(name, row)
            check_device(name, row, "values", self.values.device)
            if row.shape != leading:
                raise ValueError(
                    f"{name}: expected one number a row, {tuple(leading)}, got {tuple(row.shape)}"
                )
        check_int("vocab_size", self.vocab_size, 1)
        check_temperature(self.temperature)

    @classmethod
    def from_log_probs(
        cls, log_probs: Tensor, ids: Tensor, *, vocab_size: int, temperature: float = 1.0
    ) -> "SparseLogits":
        """Make SparseLogits of normalised log-probabilities, such as a server returns.

        Here the tail can only be 1 - sum(p), which rounding can push to zero or below. So the mass
        is clamped to leave at least float32's rounding unit, unless S is the whole vocabulary. The
        tail gets no gradient.

        Args:
            log_probs: [..., K] log-probabilities, -inf in empty slots.
            ids: [..., K] integer token ids; one outside [0, vocab_size) or repeated is an empty
                slot.
            vocab_size: V of the distribution, as the student's.
            temperature: the temperature at which the log-probabilities hold.

        Raises:
            TypeError, ValueError: the shapes differ, the ids are not integers, or a row's mass
                exceeds 1.
        """
        check_floating("log_probs", log_probs)
        _check_ids(ids, log_probs)
        check_int("vocab_size", vocab_size, 1)
        values = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
        values = values.masked_fill(canonical_ids(ids, vocab_size) < 0, -torch.inf)
        mass = values.detach().double().exp().sum(-1)
        if mass.numel() and not (mass < 1.01).all():
            raise ValueError(
                "log_probs: expected each row's probabilities to sum to at most 1, got "
                f"{mass.max():.4g}; pass natural-log probabilities, each token once"
            )
        tail = torch.log1p(-mass.clamp_max(1 - 2.0**-24)).to(values.dtype)
        tail = tail.masked_fill((values != -torch.inf).sum(-1) == vocab_size, -torch.inf)
        return cls(values, ids.long(), tail, vocab_size, temperature)

    @property
    def lse(self) -> Tensor:
        """[...] logsumexp of the whole row."""
        return _logsumexp(self.values, self.lse_outside)

    @property
    def log_probs(self) -> Tensor:
        """[..., K] log-probabilities on S, -inf in empty slots."""
        return self._normalized()[0]

    @property
    def log_tail(self) -> Tensor:
        """[...] log of the probability outside S."""
        return self._normalized()[1]

    @property
    def mass(self) -> Tensor:
        """[...] probability of S."""
        return self.log_probs.exp().sum(-1)

    def overlap(self, other: "SparseLogits") -> Tensor:
        """[...] share of this support's live ids that are in the other support, overlap@K."""
        if not isinstance(other, SparseLogits):
            raise TypeError(f"other: expected SparseLogits, got {got(other)}; call topk or gather")
        self._check_rows("other", other.ids)
        live = self.values != -torch.inf
        shared = (self._matches(other) >= 0) & live
        return shared.sum(-1) / live.sum(-1).clamp_min(1)

    def topk(self, k: int) -> "SparseLogits":
        """The same rows on their k largest slots, all of them if there are fewer; the other slots
        join the tail.

        Raises:
            TypeError, ValueError: k is not an int of at least 1.
        """
        check_int("k", k, 1)
        if k >= self.ids.shape[-1]:
            return self
        return self.at(self.ids.gather(-1, self.values.topk(k, dim=-1).indices))

    def at(self, ids: Tensor) -> "SparseLogits":
        """The same rows on other ids [..., K']; every other logit joins the tail.

        An id that this support lacks gets -inf, or NaN in a row whose tail is NaN.
        """
        check_token_ids("ids", ids)
        self._check_rows("ids", ids)
        blank = torch.zeros_like(ids, dtype=self.values.dtype)
        wanted = derived(self, values=blank, ids=canonical_ids(ids, self.vocab_size))
        slot = wanted._matches(self)
        absent = torch.where(self.lse_outside.isnan(), torch.nan, -torch.inf)[..., None]
        values = torch.where(slot < 0, absent, self.values.gather(-1, slot.clamp_min(0)))
        not_wanted = self.values.masked_fill(self._matches(wanted) >= 0, -torch.inf)
        return derived(self, values=values, ids=ids, tail=_logsumexp(not_wanted, self.lse_outside))

    def keep(self, mask: Tensor) -> "SparseLogits":
        """The same rows with the slots where mask [..., K] is False moved into the tail.

        NaN stays in its slot, so that a loss that reads only S is NaN too.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {got(mask)}; True keeps a slot")
        check_device("mask", mask, "values", self.values.device)
        if mask.shape != self.values.shape:
            raise ValueError(
                f"mask: expected the shape of values, {tuple(self.values.shape)}, got "
                f"{tuple(mask.shape)}; expand it"
            )
        mask = mask | self.values.isnan()
        dropped = self.values.masked_fill(mask, -torch.inf)
        kept = self.values.masked_fill(~mask, -torch.inf)
        return derived(self, values=kept, tail=_logsumexp(dropped, self.lse_outside))

    def detach(self) -> "SparseLogits":
        """The same rows without gradient; `ids` stays the same object (divergences._check_pair)."""
        entropy = None if self.entropy is None else self.entropy.detach()
        tail = None if self.tail is None else self.tail.detach()
        return derived(self, values=self.values.detach(), tail=tail, entropy=entropy)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SparseLogits":
        """Apply a function of the leading dimensions, such as an index, to every tensor."""
        if not callable(function):
            raise TypeError(f"function: expected a function of a tensor, got {got(function)}")
        rows = map_rows(self, function)
        return SparseLogits(**{name: getattr(rows, name) for name in _FIELDS})

    @property
    def lse_outside(self) -> Tensor:
        """[...] the tail.

        Raises:
            ValueError: these SparseLogits come from gather(tail=False).
        """
        if self.tail is None:
            raise ValueError(
                "tail: these SparseLogits have none, since they come from gather(tail=False); "
                "gather with tail=True, or use an objective that renormalises on S"
            )
        return self.tail

    def _check_rows(self, name: str, ids: Tensor) -> None:
        """Raise unless ids [..., K'] have the same leading shape, and K' >= 1."""
        check_device(name, ids, "values", self.values.device)
        leading = self.values.shape[:-1]
        if ids.dim() < 1 or ids.shape[:-1] != leading or ids.shape[-1] < 1:
            raise ValueError(
                f"{name}: expected ids [..., K] of the leading shape {tuple(leading)} with K >= 1, "
                f"got {tuple(ids.shape)}; select the same tokens from both"
            )

    def _normalized(self) -> tuple[Tensor, Tensor]:
        """log_probs and log_tail, relative to the row's largest value.

        The logsumexp of large logits would round at their size.
        """
        peak = torch.maximum(self.values.detach().amax(-1), self.lse_outside.detach())
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        values, tail = self.values - peak[..., None], self.lse_outside - peak
        lse = _logsumexp(values, tail)
        return values - lse[..., None], tail - lse

    def _matches(self, other: "SparseLogits") -> Tensor:
        """[..., K] for each of these ids the slot of `other` that has a value for it, else -1."""
        keys = other.ids.masked_fill(other.values == -torch.inf, -1)
        in_order, order = keys.sort(dim=-1, stable=True)
        position = torch.searchsorted(in_order, self.ids.contiguous()).clamp_max(keys.shape[-1] - 1)
        found = (in_order.gather(-1, position) == self.ids) & (self.ids >= 0)
        return order.gather(-1, position).masked_fill(~found, -1)


def trusted(
    values: Tensor,
    ids: Tensor,
    tail: Tensor | None,
    vocab_size: int,
    temperature: float,
    entropy: Tensor | None,
) -> SparseLogits:
    """Make SparseLogits of tensors that the package knows to fit, without the checks."""
    sparse = object.__new__(SparseLogits)
    object.__setattr__(sparse, "values", values)
    object.__setattr__(sparse, "ids", ids)
    object.__setattr__(sparse, "tail", tail)
    object.__setattr__(sparse, "vocab_size", vocab_size)
    object.__setattr__(sparse, "temperature", temperature)
    object.__setattr__(sparse, "entropy", entropy)
    return sparse


def derived(sparse: SparseLogits, **changes: Any) -> SparseLogits:
    """A copy with some tensors replaced by others that fit, without the checks."""
    return trusted(**{name: getattr(sparse, name) for name in _FIELDS} | changes)


def map_rows(sparse: SparseLogits, function: Callable[[Tensor], Tensor]) -> SparseLogits:
    """SparseLogits.map for a function of the package, without the checks."""
    return trusted(
        function(sparse.values),
        function(sparse.ids),
        None if sparse.tail is None else function(sparse.tail),
        sparse.vocab_size,
        sparse.temperature,
        None if sparse.entropy is None else function(sparse.entropy),
    )


def concatenate_rows(pieces: Sequence[SparseLogits]) -> SparseLogits:
    """Concatenate the rows [n, ...] of several SparseLogits on one vocabulary."""
    if len(pieces) == 1:
        return pieces[0]
    tensors = {
        name: torch.cat([getattr(piece, name) for piece in pieces])
        for name in ("values", "ids", "tail", "entropy")
        if getattr(pieces[0], name) is not None
    }
    return derived(pieces[0], **tensors)


def scatter_rows(sparse: SparseLogits, rows: Tensor | None, leading: torch.Size) -> SparseLogits:
    """Put the rows [n, ...] at indices `rows` of the leading shape; the other rows are empty.

    Without indices the rows are all rows of the leading shape.
    """
    return trusted(
        scatter(sparse.values, rows, leading, -torch.inf),
        scatter(sparse.ids, rows, leading, -1),
        None if sparse.tail is None else scatter(sparse.tail, rows, leading, 0.0),
        sparse.vocab_size,
        sparse.temperature,
        None if sparse.entropy is None else scatter(sparse.entropy, rows, leading, 0.0),
    )


def scatter(tensor: Tensor, rows: Tensor | None, leading: torch.Size, empty: float) -> Tensor:
    """As scatter_rows, of one tensor [n, ...]; `empty` fills the other rows."""
    if rows is not None:
        full = tensor.new_full((leading.numel(), *tensor.shape[1:]), empty)
        tensor = full.index_copy(0, rows, tensor)
    return tensor.reshape((*leading, *tensor.shape[1:]))


_FIELDS = ("values", "ids", "tail", "vocab_size", "temperature", "entropy")


def check_same_distribution(student: Any, teacher: SparseLogits) -> None:
    """Raise ValueError unless student and teacher have the same vocab_size and temperature.

    The student is SparseLogits or LazyLogits.
    """
    same_size = student.vocab_size == teacher.vocab_size
    for name, same in (
        ("vocab_size", same_size),
        ("temperature", have_same_temperature(student, teacher)),
    ):
        if not same:
            raise ValueError(
                f"{name}: expected the same value for student and teacher, got "
                f"{getattr(student, name)} and {getattr(teacher, name)}; pass {name}= to both"
            )


def have_same_temperature(a: Any, b: Any) -> bool:
    """Whether two heads, or logits of two models, have the same temperature."""
    return bool(a.temperature == b.temperature)


def canonical_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """ids [..., K] with -1 for those outside [0, vocab_size) and repeats of earlier ones."""
    ids = ids.to(torch.int64)
    ids = ids.masked_fill((ids < 0) | (ids >= vocab_size), -1)
    in_order, order = ids.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[..., 1:] = in_order[..., 1:] == in_order[..., :-1]
    return ids.masked_fill(torch.zeros_like(repeats).scatter_(-1, order, repeats), -1)


def _logsumexp(values: Tensor, tail: Tensor) -> Tensor:
    """[...] logsumexp of values [..., K] and tail; -inf, with gradient 0, where all are -inf."""
    everything = torch.cat([values, tail[..., None]], dim=-1)
    nothing = (everything == -torch.inf).all(-1, keepdim=True)
    lse = everything.masked_fill(nothing, 0.0).logsumexp(-1)
    return lse.masked_fill(nothing[..., 0], -torch.inf)


def _check_ids(ids: Tensor, values: Tensor) -> None:
    check_token_ids("ids", ids)
    check_device("ids", ids, "values", values.device)
    if ids.shape != values.shape:
        raise ValueError(
            f"ids: expected the shape of the values, {tuple(values.shape)}, got {tuple(ids.shape)}"
        )

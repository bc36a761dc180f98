"""SparseLogits: what is kept of a row of logits, and what can be read off it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from opd_kernels.linear.sparse import canonical_ids


@dataclass(frozen=True, eq=False)
class SparseLogits:
    """The final logits of each row on a support S of K ids, and the logsumexp of all the others.

    Made by LazyLogits.topk and LazyLogits.gather, or by `from_log_probs` from a server's answer. An
    empty slot has the value -inf: its id is outside [0, vocab_size), repeats an earlier slot's, or
    has no mass.

    Attributes:
        values: [..., K] logits on S, float32 (float64 from float64 operands).
        ids: [..., K] int64 token ids.
        tail: [...] logsumexp of the logits outside S, -inf where S is everything; None from
            gather(tail=False).
        vocab_size: V, the number of tokens that the row's distribution covers.
        temperature: what the logits were divided by.
        entropy: [...] entropy of the whole row in nats, detached; None unless it was asked for.
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
        """SparseLogits of log-probabilities that are already normalised, such as a server's.

        The tail can only be formed as 1 - sum(p) here, which rounding can push to zero or below. So
        the mass is clamped to leave at least float32's rounding unit, unless S is everything, and
        no gradient goes through the tail.

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
        """[...] share of this support's live ids that the other's holds, as in overlap@K."""
        if not isinstance(other, SparseLogits):
            raise TypeError(f"other: expected SparseLogits, got {got(other)}; call topk or gather")
        self._check_rows("other", other.ids)
        live = self.values != -torch.inf
        shared = (self._matches(other) >= 0) & live
        return shared.sum(-1) / live.sum(-1).clamp_min(1)

    def at(self, ids: Tensor) -> "SparseLogits":
        """The same rows on other ids [..., K'], -inf where absent; the rest joins the tail. A row
        whose tail is NaN is NaN there: what is absent may be anything.
        """
        check_token_ids("ids", ids)
        self._check_rows("ids", ids)
        blank = torch.zeros_like(ids, dtype=self.values.dtype)
        wanted = replace(self, values=blank, ids=canonical_ids(ids, self.vocab_size))
        slot = wanted._matches(self)
        absent = torch.where(self.lse_outside.isnan(), torch.nan, -torch.inf)[..., None]
        values = torch.where(slot < 0, absent, self.values.gather(-1, slot.clamp_min(0)))
        not_wanted = self.values.masked_fill(self._matches(wanted) >= 0, -torch.inf)
        return replace(self, values=values, ids=ids, tail=_logsumexp(not_wanted, self.lse_outside))

    def keep(self, mask: Tensor) -> "SparseLogits":
        """The same rows with the slots where mask [..., K] is False moved into the tail; NaN stays,
        so that a loss that reads S alone is NaN too.
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
        return replace(self, values=kept, tail=_logsumexp(dropped, self.lse_outside))

    def detach(self) -> "SparseLogits":
        """The same tensors, cut from the graph; `ids` stays the same object, see _check_pair."""
        return replace(self.map(Tensor.detach), ids=self.ids)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SparseLogits":
        """Apply a function of the leading dimensions, such as an index, to every tensor."""
        if not callable(function):
            raise TypeError(f"function: expected one of a tensor, got {got(function)}")
        return replace(
            self,
            values=function(self.values),
            ids=function(self.ids),
            tail=None if self.tail is None else function(self.tail),
            entropy=None if self.entropy is None else function(self.entropy),
        )

    @property
    def lse_outside(self) -> Tensor:
        """[...] the tail, or an error that says why there is none."""
        if self.tail is None:
            raise ValueError(
                "tail: these SparseLogits have none, since they come from gather(tail=False); "
                "gather with tail=True, or use an objective that renormalises on S"
            )
        return self.tail

    def _check_rows(self, name: str, ids: Tensor) -> None:
        """Raise unless ids [..., K'] are of as many rows, with K' >= 1."""
        check_device(name, ids, "values", self.values.device)
        leading = self.values.shape[:-1]
        if ids.dim() < 1 or ids.shape[:-1] != leading or ids.shape[-1] < 1:
            raise ValueError(
                f"{name}: expected ids [..., K] of the leading shape {tuple(leading)} with K >= 1, "
                f"got {tuple(ids.shape)}; select the same tokens from both"
            )

    def _normalized(self) -> tuple[Tensor, Tensor]:
        """log_probs and log_tail, relative to the row's largest: lse rounds at its own size."""
        peak = torch.maximum(self.values.detach().amax(-1), self.lse_outside.detach())
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        values, tail = self.values - peak[..., None], self.lse_outside - peak
        lse = _logsumexp(values, tail)
        return values - lse[..., None], tail - lse

    def _matches(self, other: "SparseLogits") -> Tensor:
        """[..., K] the slot of `other` that holds each of these ids with a value, else -1."""
        keys = other.ids.masked_fill(other.values == -torch.inf, -1)
        in_order, order = keys.sort(dim=-1, stable=True)
        position = torch.searchsorted(in_order, self.ids.contiguous()).clamp_max(keys.shape[-1] - 1)
        found = (in_order.gather(-1, position) == self.ids) & (self.ids >= 0)
        return order.gather(-1, position).masked_fill(~found, -1)


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

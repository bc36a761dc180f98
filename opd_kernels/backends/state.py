"""What one pass over the vocabulary keeps of every row: the state that epilogues update."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowState:
    """Running statistics of the logits seen so far; every tensor is updated in place.

    The tail is the online logsumexp (Milakov and Gimelshein, arXiv 1805.02867) of the logits
    outside S: `sum` = sum exp(z - max). A candidate evicted from the running top-K joins it.
    `moment` = sum exp(z - max) * (z - max) is kept only for the entropy.
    """

    values: Tensor  # [N, K] logits on S, -inf in an empty slot
    ids: Tensor  # [N, K] int64, -1 in an empty slot
    selects: bool  # True: ids are the running top-K; False: ids are given and only gathered
    max: Tensor  # [N]
    sum: Tensor  # [N]
    moment: Tensor | None  # [N]

    @classmethod
    def for_topk(cls, tokens: int, k: int, entropy: bool, like: Tensor) -> "RowState":
        """The state before the first chunk, selecting the k largest logits of each row."""
        ids = torch.full((tokens, k), -1, dtype=torch.int64, device=like.device)
        return cls._empty(ids, True, entropy, like)

    @classmethod
    def for_ids(cls, ids: Tensor, entropy: bool, like: Tensor) -> "RowState":
        """The state before the first chunk, gathering at ids [N, K] from sparse.canonical_ids."""
        return cls._empty(ids, False, entropy, like)

    @classmethod
    def _empty(cls, ids: Tensor, selects: bool, entropy: bool, like: Tensor) -> "RowState":
        tokens = ids.shape[0]
        return cls(
            values=like.new_full(ids.shape, -torch.inf),
            ids=ids,
            selects=selects,
            max=like.new_full((tokens,), -torch.inf),
            sum=like.new_zeros(tokens),
            moment=like.new_zeros(tokens) if entropy else None,
        )

    def rows(self, rows: slice) -> "RowState":
        """A view of some rows; updating it updates this state."""
        return RowState(
            self.values[rows],
            self.ids[rows],
            self.selects,
            self.max[rows],
            self.sum[rows],
            None if self.moment is None else self.moment[rows],
        )

    def close(self) -> None:
        """After the last chunk: make NaN of every value in a row that has one, which a backend may
        have met in the tail alone. A loss that reads S alone would miss it there.
        """
        is_nan = self.sum.isnan()
        self.values.masked_fill_(is_nan[:, None], torch.nan)
        if self.selects:  # nothing was selected, perhaps: one id, so that gradients are NaN too
            first = self.ids[:, 0]
            first.copy_(torch.where(is_nan, first.clamp_min(0), first))

    def tail(self) -> Tensor:
        """logsumexp of the logits outside S, [N]; -inf where S is everything."""
        # In float64, so that the result is rounded once: at its size that is most of its error.
        return (self.max.double() + self.sum.double().log()).to(self.max.dtype)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, [N]: log Z - E[z], relative to the row's largest logit."""
        if self.moment is None:
            raise RuntimeError("this state was made without entropy=True")
        peak = torch.maximum(self.max, self.values.amax(-1))
        on_support = self.values - peak[:, None]
        weights = on_support.exp()
        gap = (self.max - peak).clamp_min(torch.finfo(peak.dtype).min)
        decay = gap.exp()
        total = weights.sum(-1) + decay * self.sum
        moment = (weights * on_support.masked_fill(weights == 0, 0.0)).sum(-1)
        moment = moment + decay * (self.moment + self.sum * gap.masked_fill(decay == 0, 0.0))
        return total.log() - moment / total

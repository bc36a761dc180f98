"""Vocabulary-parallel heads: each rank of a group holds some of the weight's rows, in order.

Hidden states are the same on every rank, and so is all that comes out. A rank reduces its own rows
to SparseLogits, as ever; what is merged over the ranks is [N, K] and [N], in Python, so that no
kernel knows of ranks. Every rank then has the same loss, whose gradient goes back to its own rows.
One more collective sums dhidden [N, D], since each rank's rows have a part of it: f and g of
Megatron-LM, arXiv 1909.08053 section 3.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from opd_kernels.checks import check_int, got
from opd_kernels.sparse_logits import SparseLogits

T = TypeVar("T")


@dataclass(frozen=True)
class VocabShard:
    """Which rows of a vocabulary-parallel weight each rank has; made by `of`, on all of them.

    Attributes:
        group: the ranks; their order is that of their rows.
        starts: the first row of each rank, and the number of rows behind the last: [ranks + 1].
    """

    group: dist.ProcessGroup
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_group(self.group)
        starts, ranks = self.starts, dist.get_world_size(self.group)
        is_known = isinstance(starts, tuple) and all(isinstance(start, int) for start in starts)
        ascends = is_known and starts[:1] == (0,) and all(a <= b for a, b in pairwise(starts))
        if not ascends or len(starts) != ranks + 1:
            raise ValueError(
                f"starts: expected a tuple of {ranks + 1} ascending ints from 0, got {starts!r}; "
                "make the shard by VocabShard.of(weight, group)"
            )

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None = None) -> "VocabShard":
        """The shard of weight [V_rank, D], which may differ in V_rank, or have none.

        A collective that waits for all ranks: make it once, not in every step.

        Args:
            weight: this rank's rows.
            group: the ranks that hold the others; default all.
        """
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            came = tuple(weight.shape) if isinstance(weight, Tensor) else got(weight)
            raise TypeError(f"weight: expected this rank's rows, a tensor [V, D], got {came}")
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError(
                "group: expected a process group, got none; call torch.distributed."
                "init_process_group first"
            )
        _check_group(group)
        own = torch.tensor([weight.shape[0]], device=weight.device)
        counts = _gathered(own, group).flatten().cumsum(0)
        return cls(group, (0, *counts.tolist()))

    def is_like(self, other: "VocabShard") -> bool:
        """Whether the other one splits over the same ranks in the same way."""
        if not isinstance(other, VocabShard):
            raise TypeError(f"other: expected a VocabShard, got {got(other)}")
        ranks = [dist.get_process_group_ranks(shard.group) for shard in (self, other)]
        return self.starts == other.starts and ranks[0] == ranks[1]

    @property
    def rank(self) -> int:
        """This process in the group."""
        return dist.get_rank(self.group)

    @property
    def largest(self) -> int:
        """The most rows that a rank has: what chunks are planned by, the same on every rank."""
        return max(b - a for a, b in pairwise(self.starts))

    def rows(self, vocab_size: int) -> slice:
        """This rank's rows below V; there may be none."""
        check_int("vocab_size", vocab_size, 0)
        first, last = self.starts[self.rank : self.rank + 2]
        return slice(min(first, vocab_size), min(last, vocab_size))

    def check_rows(self, count: int) -> None:
        """Raise unless this rank's weight has the rows that the shard was made of."""
        own = self.rows(self.starts[-1])
        if count != own.stop - own.start:
            raise ValueError(
                f"weight: expected the {own.stop - own.start} rows of this rank's shard, got "
                f"{count}; make the shard by VocabShard.of(weight, group)"
            )

    def local_ids(self, ids: Tensor, vocab_size: int) -> Tensor:
        """Global ids as rows of this rank, -1 for those of others."""
        rows = self.rows(vocab_size)
        return (ids - rows.start).masked_fill((ids < rows.start) | (ids >= rows.stop), -1)

    def merge_topk(self, own: SparseLogits, k: int, vocab_size: int) -> SparseLogits:
        """The K largest of all ranks from the K largest [N, K] of each; the others join the tail.

        Ties go to the lower id: ranks hold ascending ids, and the sort is stable.
        """
        start = self.rows(vocab_size).start
        missing = k - own.values.shape[-1]  # of a rank with fewer rows than K
        values = functional.pad(own.values, (0, missing), value=-torch.inf)
        empty = (own.values == -torch.inf) | (own.ids < 0)
        ids = functional.pad((own.ids + start).masked_fill(empty, -1), (0, missing), value=-1)
        ids = self.gather(ids)
        values, tails = self._gather_rows(values, own.tail)
        assert tails is not None
        candidates, order = values.sort(dim=-1, descending=True, stable=True)
        ids = ids.transpose(0, 1).flatten(1).gather(-1, order[:, :k])
        tail = _logsumexp(torch.cat([candidates[:, k:], tails], dim=-1))
        entropy = self._entropy(own)
        return replace(
            own,
            values=candidates[:, :k],
            ids=ids,
            tail=tail,
            vocab_size=vocab_size,
            entropy=entropy,
        )

    def merge_given(self, own: SparseLogits, ids: Tensor, vocab_size: int) -> SparseLogits:
        """Values at ids [N, K], each from the rank that has its row, and the tail of all ranks."""
        slots = ids.shape[-1]
        owner = torch.zeros_like(ids)
        for start in self.starts[1:-1]:
            owner += ids.clamp_max(vocab_size - 1) >= start
        values, tails = self._gather_rows(own.values, own.tail)
        values = values.gather(-1, owner * slots + torch.arange(slots, device=ids.device))
        if tails is not None:  # NaN in another rank's rows is not on S
            values = values.masked_fill(tails.detach().isnan().any(-1, keepdim=True), torch.nan)
        tail = None if tails is None else _logsumexp(tails)
        entropy = self._entropy(own)
        return replace(
            own, values=values, ids=ids, tail=tail, vocab_size=vocab_size, entropy=entropy
        )

    def merge_rows(self, own: Tensor, vocab_size: int) -> Tensor:
        """Whole rows [N, V] from every rank's part of them, differentiable."""
        padded = functional.pad(own, (0, self.largest - own.shape[-1]))
        parts, _ = _GatherRows.apply(padded, None, self)
        ends = [min(start, vocab_size) for start in self.starts]
        sizes = [b - a for a, b in pairwise(ends)]
        return torch.cat([part[:, :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def sum_gradient(self, hidden: Tensor) -> Tensor:
        """The same hidden states [..., D], whose gradient is the sum over the ranks."""
        return _SumGradient.apply(hidden, self)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient."""
        total = partial.detach().clone()
        _collective(lambda: dist.all_reduce(total, group=self.group))
        return total

    def gather(self, own: Tensor) -> Tensor:
        """[ranks, ...] of every rank, without a gradient."""
        return _gathered(own.detach(), self.group)

    def _gather_rows(self, values: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All ranks' values [N, ranks * K] and tails [N, ranks], differentiable."""
        values, tails = _GatherRows.apply(values, tail, self)
        return values.transpose(0, 1).flatten(1), None if tails is None else tails.transpose(0, 1)

    def _entropy(self, own: SparseLogits) -> Tensor | None:
        """H = sum_r P_r (H_r - log P_r), with P_r the mass of rank r's rows."""
        if own.entropy is None:
            return None
        parts = self.gather(torch.stack([own.lse.detach(), own.entropy]))  # [ranks, 2, N]
        log_mass = parts[:, 0].log_softmax(0)
        terms = log_mass.exp() * (parts[:, 1] - log_mass)
        return torch.where(log_mass == -torch.inf, 0.0, terms).sum(0)


def shard_of_dtensor(weight: Any) -> VocabShard | None:
    """The shard of a DTensor [V, D] that is split by rows over one dimension of its mesh; None for
    one that is whole on every rank.

    Raises:
        TypeError, ValueError: it is no DTensor, or it is split otherwise.
    """
    if not is_dtensor(weight):
        raise TypeError(
            f"weight: expected a DTensor, got {got(weight)}; of a rank's own rows make "
            "VocabShard.of(weight, group)"
        )
    from torch.distributed.tensor import Replicate, Shard

    split = [i for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if not split:
        return None
    if len(split) != 1 or weight.placements[split[0]] != Shard(0):
        raise ValueError(
            "weight: expected a DTensor that is split by rows, Shard(0), over one dimension of its "
            f"mesh, got {weight.placements}; redistribute it, or pass weight.full_tensor()"
        )
    mesh, group = weight.device_mesh, weight.device_mesh.get_group(split[0])
    names = mesh.mesh_dim_names
    if names is None or "tp" not in names[split[0]]:
        raise ValueError(
            "weight: expected a DTensor that is split over a dimension of its mesh with tp in its "
            f"name, got {names}; FSDP's ranks have other tokens: compute the loss inside the "
            "forward pass or pass weight.full_tensor(); for tensor parallelism pass "
            "weight.to_local() and shard=VocabShard.of(...)"
        )
    if mesh.get_local_rank(split[0]) != dist.get_rank(group):
        raise ValueError(
            "weight: expected a mesh whose ranks are in the order of its process group's; pass "
            "weight.to_local() and shard=VocabShard.of(...)"
        )
    ranks, rows = weight.device_mesh.size(split[0]), weight.shape[0]
    size = -(-rows // ranks)  # as torch.chunk splits
    starts = tuple(min(rank * size, rows) for rank in range(ranks + 1))
    return VocabShard(group, starts)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is one; the module that has them is slow to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def plain(tensor: Any, whole: bool = False) -> Any:
    """A DTensor's part on this rank, or all of it; anything else as it is."""
    if not is_dtensor(tensor):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()


def _check_group(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group, got {got(group)}")


class _GatherRows(torch.autograd.Function):
    """Values [ranks, N, K] and tails [ranks, N] of every rank, in one collective. The loss of all
    is the same, so a rank's gradient is its own; a tail that the loss never used gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, tail: Tensor | None, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.rank = shard.rank
        own = values if tail is None else torch.cat([values, tail[:, None]], dim=-1)
        everything = _gathered(own, shard.group)
        if tail is None:
            return everything, None
        return everything[..., :-1].contiguous(), everything[..., -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dvalues: Tensor | None, dtails: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        own = [None if gradient is None else gradient[ctx.rank] for gradient in (dvalues, dtails)]
        return own[0], own[1], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return ctx.shard.sum(gradient.to(wide)).to(gradient.dtype), None


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = own.new_empty((dist.get_world_size(group), *own.shape))
    own = own.contiguous()
    _collective(lambda: dist.all_gather(list(result.unbind()), own, group=group))
    return result


def _collective(call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:
        raise RuntimeError(
            "vocabulary-parallel head: another rank of the group may have failed or be gone, see "
            f"its own error; every rank must take part with the same tokens ({error})"
        ) from error


def _logsumexp(parts: Tensor) -> Tensor:
    """[N] logsumexp of [N, ...], rounded once; -inf, with gradient 0, where all are -inf."""
    nothing = (parts == -torch.inf).all(-1, keepdim=True)
    lse = parts.double().masked_fill(nothing, 0.0).logsumexp(-1)
    return lse.masked_fill(nothing[..., 0], -torch.inf).to(parts.dtype)

"""Vocabulary-parallel heads: each rank of a group holds a contiguous slice of the weight's rows.

Hidden states are the same on every rank, and so are all results. Each rank reduces its rows to
SparseLogits as if they were the whole head. Then the ranks merge these tensors [N, K] and [N] in
Python, so that no kernel depends on ranks. Every rank computes the same loss and backpropagates it
through its own rows. One more collective sums dhidden [N, D], since each rank's rows contribute a
part of it: the operators f and g of Megatron-LM (arXiv 1909.08053, section 3).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from opd_kernels.checks import check_int, got
from opd_kernels.derivatives import differentiable_once
from opd_kernels.sparse_logits import SparseLogits, derived

T = TypeVar("T")


@dataclass(frozen=True)
class VocabShard:
    """The rows of a vocabulary-parallel weight that each rank holds.

    Make it on all ranks with `VocabShard.from_weight`.

    Attributes:
        group: the process group; the rows are in the order of its ranks.
        starts: the first row of each rank, followed by the total number of rows: [ranks + 1].
    """

    group: dist.ProcessGroup
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_group(self.group)
        starts, ranks = self.starts, dist.get_world_size(self.group)
        are_ints = isinstance(starts, tuple) and all(isinstance(start, int) for start in starts)
        ascends = are_ints and starts[:1] == (0,) and all(a <= b for a, b in pairwise(starts))
        if not ascends or len(starts) != ranks + 1:
            raise ValueError(
                f"starts: expected a tuple of {ranks + 1} ascending ints from 0, got {starts!r}; "
                "make the shard with VocabShard.from_weight(weight, group)"
            )

    @classmethod
    def from_weight(cls, weight: Tensor, group: dist.ProcessGroup | None = None) -> "VocabShard":
        """Return the shard of a weight whose rows are distributed over the ranks of a group.

        This is a collective operation, so all ranks must call it. Call it once, not in every step.

        Args:
            weight: [V_rank, D] this rank's rows. Ranks may have different numbers of rows, or none.
            group: the ranks that share the weight; default all ranks.

        Returns:
            The VocabShard to pass to LazyLogits.

        Raises:
            TypeError: weight is not a tensor [V, D], or group is not a process group.
            ValueError: group is None and torch.distributed is not initialised.
        """
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            received = tuple(weight.shape) if isinstance(weight, Tensor) else got(weight)
            raise TypeError(f"weight: expected this rank's rows, a tensor [V, D], got {received}")
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError(
                "group: expected a process group, got none; call torch.distributed."
                "init_process_group first"
            )
        _check_group(group)
        local_rows = torch.tensor([weight.shape[0]], device=weight.device)
        ends = _all_gather(local_rows, group).flatten().cumsum(0)
        return cls(group, (0, *ends.tolist()))

    def same_split_as(self, other: "VocabShard") -> bool:
        """Return whether the other shard assigns the same rows to the same ranks."""
        if not isinstance(other, VocabShard):
            raise TypeError(f"other: expected a VocabShard, got {got(other)}")
        ranks = [dist.get_process_group_ranks(shard.group) for shard in (self, other)]
        return self.starts == other.starts and ranks[0] == ranks[1]

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def largest(self) -> int:
        """Largest number of rows on any rank. Chunk sizes depend on it, so that every rank has as
        many chunks and collectives as the others.
        """
        return max(b - a for a, b in pairwise(self.starts))

    def rows(self, vocab_size: int) -> slice:
        """Return the slice of this rank's rows below vocab_size, which may be empty."""
        check_int("vocab_size", vocab_size, 0)
        first, last = self.starts[self.rank : self.rank + 2]
        return slice(min(first, vocab_size), min(last, vocab_size))

    def check_rows(self, count: int) -> None:
        """Raise ValueError unless this rank's weight has `count` rows in the shard."""
        local = self.rows(self.starts[-1])
        if count != local.stop - local.start:
            raise ValueError(
                f"weight: expected the {local.stop - local.start} rows of this rank's shard, got "
                f"{count}; make the shard with VocabShard.from_weight(weight, group)"
            )

    def local_ids(self, ids: Tensor, vocab_size: int) -> Tensor:
        """Convert global ids to rows of this rank's weight; ids on other ranks become -1."""
        rows = self.rows(vocab_size)
        return (ids - rows.start).masked_fill((ids < rows.start) | (ids >= rows.stop), -1)

    def merge_topk(self, local: SparseLogits, k: int, vocab_size: int) -> SparseLogits:
        """Return the K largest logits of all ranks, given the K largest [N, K] of each rank. The
        other candidates join the tail.

        Ties go to the lower id, since ranks hold ascending ids and the sort is stable.
        """
        start = self.rows(vocab_size).start
        missing = k - local.values.shape[-1]  # a rank may have fewer than K rows
        values = functional.pad(local.values, (0, missing), value=-torch.inf)
        empty = (local.values == -torch.inf) | (local.ids < 0)
        ids = functional.pad((local.ids + start).masked_fill(empty, -1), (0, missing), value=-1)
        ids = self.gather(ids)
        values, tails = self._gather_rows(values, local.tail)
        assert tails is not None
        candidates, order = values.sort(dim=-1, descending=True, stable=True)
        ids = ids.transpose(0, 1).flatten(1).gather(-1, order[:, :k])
        tail = _logsumexp(torch.cat([candidates[:, k:], tails], dim=-1))
        entropy = self._entropy(local)
        return derived(
            local,
            values=candidates[:, :k],
            ids=ids,
            tail=tail,
            vocab_size=vocab_size,
            entropy=entropy,
        )

    def merge_given(self, local: SparseLogits, ids: Tensor, vocab_size: int) -> SparseLogits:
        """Return the logits at global ids [N, K], each from the rank that holds its row, and the
        tail over all ranks.
        """
        slots = ids.shape[-1]
        owner = torch.zeros_like(ids)
        for start in self.starts[1:-1]:
            owner += ids.clamp_max(vocab_size - 1) >= start
        values, tails = self._gather_rows(local.values, local.tail)
        values = values.gather(-1, owner * slots + torch.arange(slots, device=ids.device))
        # A NaN outside S shows only in the tail of its rank. The values become NaN too, so that a
        # loss that reads only S is NaN.
        if tails is not None:
            values = values.masked_fill(tails.detach().isnan().any(-1, keepdim=True), torch.nan)
        tail = None if tails is None else _logsumexp(tails)
        entropy = self._entropy(local)
        return derived(
            local, values=values, ids=ids, tail=tail, vocab_size=vocab_size, entropy=entropy
        )

    def merge_rows(self, local: Tensor, vocab_size: int) -> Tensor:
        """Concatenate every rank's columns of the logits to whole rows [N, V]; differentiable."""
        padded = functional.pad(local, (0, self.largest - local.shape[-1]))
        parts, _ = _GatherRows.apply(padded, None, self)
        ends = [min(start, vocab_size) for start in self.starts]
        sizes = [b - a for a, b in pairwise(ends)]
        return torch.cat([part[:, :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def sum_gradient(self, hidden: Tensor) -> Tensor:
        """Return hidden [..., D] unchanged; its gradient is summed over the ranks."""
        return _SumGradient.apply(hidden, self)

    def sum(self, partial: Tensor) -> Tensor:
        """Return the sum over the ranks, without a gradient."""
        total = partial.detach().clone()
        _run_collective(lambda: dist.all_reduce(total, group=self.group))
        return total

    def gather(self, local: Tensor) -> Tensor:
        """Stack the tensors [...] of all ranks to [ranks, ...], without a gradient."""
        return _all_gather(local.detach(), self.group)

    def _gather_rows(self, values: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return all ranks' values [N, ranks * K] and tails [N, ranks]; differentiable."""
        values, tails = _GatherRows.apply(values, tail, self)
        return values.transpose(0, 1).flatten(1), None if tails is None else tails.transpose(0, 1)

    def _entropy(self, local: SparseLogits) -> Tensor | None:
        """Entropy H = sum_r P_r (H_r - log P_r), where P_r is the mass of rank r's rows and H_r the
        entropy of their renormalised distribution.
        """
        if local.entropy is None:
            return None
        parts = self.gather(torch.stack([local.lse.detach(), local.entropy]))  # [ranks, 2, N]
        log_mass = parts[:, 0].log_softmax(0)
        terms = log_mass.exp() * (parts[:, 1] - log_mass)
        return torch.where(log_mass == -torch.inf, 0.0, terms).sum(0)


def shard_of_dtensor(weight: Any) -> VocabShard | None:
    """Return the shard of a DTensor weight that is split by rows over one mesh dimension.

    Args:
        weight: DTensor [V, D] with the placement Shard(0) in one mesh dimension whose name contains
            "tp", and Replicate in all others.

    Returns:
        The VocabShard, or None if every rank holds the whole weight.

    Raises:
        TypeError: weight is not a DTensor.
        ValueError: weight is split in another way.
    """
    if not is_dtensor(weight):
        raise TypeError(
            f"weight: expected a DTensor, got {got(weight)}; for a plain tensor with this rank's "
            "rows call VocabShard.from_weight(weight, group)"
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
            "weight: expected a DTensor that is split over a mesh dimension with 'tp' in its name, "
            f"got the dimension names {names}; under FSDP, where ranks have different tokens, "
            "compute the loss inside the forward pass or pass weight.full_tensor(); for tensor "
            "parallelism pass weight.to_local() and shard=VocabShard.from_weight(...)"
        )
    if mesh.get_local_rank(split[0]) != dist.get_rank(group):
        raise ValueError(
            "weight: expected a mesh with the ranks in the order of its process group, got another "
            "order; pass weight.to_local() and shard=VocabShard.from_weight(...)"
        )
    ranks, rows = weight.device_mesh.size(split[0]), weight.shape[0]
    size = -(-rows // ranks)  # DTensor splits rows as torch.chunk does
    starts = tuple(min(rank * size, rows) for rank in range(ranks + 1))
    return VocabShard(group, starts)


def is_dtensor(tensor: Any) -> bool:
    """Return whether tensor is a DTensor, without importing their module, which is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def plain(tensor: Any, whole: bool = False) -> Any:
    """Convert a DTensor to a plain tensor; return anything else unchanged.

    Args:
        tensor: a DTensor or anything else.
        whole: return the whole tensor, which is a collective operation, instead of the part on this
            rank.
    """
    if not is_dtensor(tensor):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()


def _check_group(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group, got {got(group)}")


class _GatherRows(torch.autograd.Function):
    """Values [ranks, N, K] and tails [ranks, N] of all ranks, gathered in one collective. All ranks
    compute the same loss, so backward takes this rank's slice of the gradient and needs no
    collective. A tail that the loss does not use gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, tail: Tensor | None, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.rank = shard.rank
        local = values if tail is None else torch.cat([values, tail[:, None]], dim=-1)
        gathered = _all_gather(local, shard.group)
        if tail is None:
            return gathered, None
        return gathered[..., :-1].contiguous(), gathered[..., -1].contiguous()

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor | None, dtails: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return differentiable_once(_GatherRows.backward, ctx, dvalues, dtails)
        local = [None if gradient is None else gradient[ctx.rank] for gradient in (dvalues, dtails)]
        return local[0], local[1], None


class _SumGradient(torch.autograd.Function):
    """The identity, whose backward sums the gradient over the ranks, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return differentiable_once(_SumGradient.backward, ctx, gradient)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return ctx.shard.sum(gradient.to(wide)).to(gradient.dtype), None


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = local.new_empty((dist.get_world_size(group), *local.shape))
    local = local.contiguous()
    _run_collective(lambda: dist.all_gather(list(result.unbind()), local, group=group))
    return result


def _run_collective(call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:
        raise RuntimeError(
            "vocabulary-parallel head: another rank of the group may have failed or exited; see "
            f"its error. Every rank must compute the loss of the same tokens ({error})"
        ) from error


def _logsumexp(parts: Tensor) -> Tensor:
    """Logsumexp [N] of parts [N, M], in float64. Rows of -inf give -inf and the gradient 0."""
    all_empty = (parts == -torch.inf).all(-1, keepdim=True)
    lse = parts.double().masked_fill(all_empty, 0.0).logsumexp(-1)
    return lse.masked_fill(all_empty[..., 0], -torch.inf).to(parts.dtype)

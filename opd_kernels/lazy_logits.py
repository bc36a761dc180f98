"""LazyLogits: hidden states and the head that would turn them into logits."""

from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends.records import Head, Operands, accumulator_dtype
from opd_kernels.checks import (
    check_execution,
    check_flags,
    check_hidden_is_finite,
    check_ids,
    check_int,
    check_k,
    check_operands,
    check_reverse_mode,
    check_scalars,
    check_targets,
    check_vocab_size,
    got,
)
from opd_kernels.linear.operators import FlatLogits
from opd_kernels.parallel import VocabShard, is_dtensor, plain, shard_of_dtensor
from opd_kernels.sparse_logits import SparseLogits, derived, map_rows


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The logits z = softcap(scale * (hidden @ weight.T + bias)) / temperature, not yet computed.

    Logits, tails and losses are float32 whatever dtype the operands have (float64 from float64
    operands). Gradients come back in each operand's own dtype. Under autocast the operands are cast
    to its dtype first. `topk`, `gather` and the losses can be differentiated once, in reverse mode;
    second derivatives, forward mode and torch.func need `materialize`.

    Args:
        hidden: [..., D] the head's input.
        weight: [V_padded, D] the head's weight.
        bias: [V_padded] or None.
        softcap: cap of softcap * tanh(x / softcap), as in Gemma 2, or None.
        scale: factor on the product, as in Cohere and Granite.
        temperature: divisor of the final logits; the loss and its gradient carry the same factor.
        vocab_size: V, the number of leading rows of weight that are tokens; default all. The rest
            is padding.
        shard: the rows that this rank has of a vocabulary-parallel head, see parallel.VocabShard.
            hidden is then the same on all ranks, and so are logits and losses. A DTensor weight
            that is split by rows brings its own shard.
        check_finite: look for NaN and inf in hidden now and name the rows (synchronises with the
            device).

    Raises:
        TypeError: an operand is not a floating tensor.
        ValueError: shapes, devices or options do not fit; the message names the argument and the
            remedy.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None
    shard: VocabShard | None = None
    check_finite: InitVar[bool] = False
    # The operands without hidden. With a shard, weight has this rank's rows, but vocab_size
    # counts the tokens of all ranks.
    head: Head = field(init=False, repr=False)

    def __post_init__(self, check_finite: bool) -> None:
        check_flags(check_finite=check_finite)
        if is_dtensor(self.weight):
            if self.shard is not None:
                raise ValueError("shard: expected none, as a DTensor weight brings its own")
            object.__setattr__(self, "shard", shard_of_dtensor(self.weight))
        object.__setattr__(self, "hidden", plain(self.hidden, whole=True))
        for name in ("weight", "bias"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        check_operands(self.hidden, self.weight, self.bias)
        rows = self.weight.shape[0]
        if self.shard is not None:
            if not isinstance(self.shard, VocabShard):
                raise TypeError(
                    f"shard: expected a VocabShard or None, got {got(self.shard)}; make it with "
                    "VocabShard.from_weight(weight, group)"
                )
            self.shard.check_rows(rows)
            rows = self.shard.starts[-1]
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", rows)
        check_scalars(self.softcap, self.scale, self.temperature)
        check_vocab_size(self.vocab_size, rows)
        if check_finite:
            check_hidden_is_finite(self.hidden)
        softcap = None if self.softcap is None else float(self.softcap)
        scalars = (softcap, float(self.scale), float(self.temperature))
        head = Head(self.weight, self.bias, *scalars, self._vocab_size)
        object.__setattr__(self, "head", head)

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions and V: the shape that materialize() would return."""
        return torch.Size((*self.hidden.shape[:-1], self._vocab_size))

    @property
    def requires_grad(self) -> bool:
        """Whether a loss of these logits has a gradient."""
        return Operands(self.hidden, self.head).requires_grad

    def __getitem__(self, index: Any) -> "LazyLogits":
        """Select rows by an index of the leading dimensions, such as a mask of tokens."""
        parts = index if isinstance(index, tuple) else (index,)
        rest = () if any(part is Ellipsis for part in parts) else (...,)
        try:  # the index must not reach hidden's last dimension, which the logits do not have
            hidden = self.hidden[(*parts, *rest, slice(None))]
        except (IndexError, TypeError) as error:  # IndexError ends an iteration
            raise type(error)(
                f"index: expected an index of rows of {tuple(self.hidden.shape[:-1])}, such as a "
                f"mask of tokens, got one that does not fit ({error})"
            ) from error
        return replace(self, hidden=hidden)

    def detach(self) -> "LazyLogits":
        """The same logits without gradient, as for a teacher."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def topk(
        self,
        k: int,
        *,
        entropy: bool = False,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> SparseLogits:
        """The k largest logits of each row and the logsumexp of the rest, in one pass over the
        vocabulary.

        Ties go to the lower id. A logit of -inf never enters S; such a slot stays empty.
        Differentiable through values and tail.

        Args:
            k: K, from 1 to V.
            entropy: also return the entropy of each row, from the same pass, detached.
            chunk_bytes: the most memory for logits at a time; default by the device.
            backend: "auto", or a name of available_backends().

        Raises:
            TypeError, ValueError: k is out of range, the backend is missing, or an option has
                another type.
        """
        check_k(k, self._vocab_size)
        check_flags(entropy=entropy)
        check_execution(chunk_bytes, backend)
        check_reverse_mode(self.hidden, self.weight, self.bias)
        return self._unflatten(self.flat().topk(k, entropy, chunk_bytes, backend))

    def gather(
        self,
        ids: Tensor,
        *,
        tail: bool = True,
        entropy: bool = False,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> SparseLogits:
        """The logits at given ids and the logsumexp of the rest, in one pass over the vocabulary.

        Args:
            ids: [..., K] integer token ids; one outside [0, V) is an empty slot, a repeated one
                counts once.
            tail: False computes only N * K dot products, for losses that renormalise on S.
            entropy: also return the entropy of each row, detached; needs tail=True.
            chunk_bytes, backend: as in topk.

        Raises:
            ValueError: ids do not fit hidden or are not integers; entropy without tail.
        """
        check_ids(ids, self.hidden)
        check_flags(tail=tail, entropy=entropy)
        check_execution(chunk_bytes, backend)
        if entropy and not tail:
            raise ValueError("entropy: it needs a pass over the vocabulary; gather with tail=True")
        check_reverse_mode(self.hidden, self.weight, self.bias)
        flat_ids = ids.reshape(-1, ids.shape[-1])
        rows = self.flat().gather(flat_ids, entropy, chunk_bytes, backend, tail)
        # The caller's own tensor: `teacher.gather(s.ids).ids is s.ids` proves the supports equal.
        return derived(self._unflatten(rows), ids=ids)

    def log_prob(
        self,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """log p(target) of each row, [...]: minus the cross-entropy, without the logits.

        Args:
            targets: [...] integer token ids. `ignore_index` gives 0 and no gradient; any other id
                outside [0, V) gives -inf.
            ignore_index: the target of rows that do not count.
            chunk_bytes, backend: as in topk.

        Raises:
            TypeError, ValueError: targets are not integers, or not one for each row.
        """
        check_targets(targets, self.hidden)
        check_int("ignore_index", ignore_index)
        sparse = self.gather(targets[..., None], chunk_bytes=chunk_bytes, backend=backend)
        return sparse.log_probs[..., 0].masked_fill(targets == ignore_index, 0.0)

    def materialize(self) -> Tensor:
        """The full logits [..., V], which this package exists to avoid: for tests."""
        flat = self.flat()
        head, size = flat.head, flat.head.vocab_size
        dtype = accumulator_dtype(flat.hidden, head.weight)
        with torch.autocast(flat.hidden.device.type, enabled=False):
            scores = flat.hidden.to(dtype) @ head.weight[:size].to(dtype).t()
            if head.bias is not None:
                scores = scores + head.bias[:size].to(dtype)
            logits = head.logits(scores)
        if flat.shard is not None:
            logits = flat.shard.merge_rows(logits, flat.vocab_size)
        return logits.reshape(self.shape)

    def flat(self) -> FlatLogits:
        """The same logits with hidden as [N, D] and the operands in autocast's dtype."""
        flat = FlatLogits.flatten(self.hidden, self.head)
        return flat if self.shard is None else flat.split(self.shard, whole=False)

    @property
    def _vocab_size(self) -> int:
        assert self.vocab_size is not None  # __post_init__ has set it
        return self.vocab_size

    def _unflatten(self, rows: SparseLogits) -> SparseLogits:
        """[N, ...] as [..., ...]."""
        leading = self.hidden.shape[:-1]
        return map_rows(rows, lambda tensor: tensor.reshape((*leading, *tensor.shape[1:])))

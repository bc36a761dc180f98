"""LazyLogits: hidden states and the head that would turn them into logits, until somebody asks."""

from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd_kernels.backends.head import Head, accumulator_dtype
from opd_kernels.checks import check_execution, check_flags, check_int, got
from opd_kernels.linear.operators import linear_gather, linear_topk
from opd_kernels.operands import (
    check_hidden_is_finite,
    check_ids,
    check_k,
    check_operands,
    check_scalars,
    check_targets,
    check_vocab_size,
)
from opd_kernels.parallel import VocabShard, is_dtensor, plain, shard_of_dtensor
from opd_kernels.sparse_logits import SparseLogits


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The logits z = softcap(scale * (hidden @ weight.T + bias)) / temperature, not yet computed.

    Logits, tails and losses are float32 whatever the operands hold (float64 from float64 operands),
    and gradients come back in each operand's own dtype. Under autocast the operands are cast to its
    dtype first.

    Args:
        hidden: [..., D] the head's input.
        weight: [V_padded, D] the head's weight.
        bias: [V_padded] or None.
        softcap: cap of softcap * tanh(x / softcap), as in Gemma 2, or None.
        scale: factor on the product, as in Cohere and Granite.
        temperature: divisor of the final logits; the loss and its gradient carry the same factor.
        vocab_size: V, the number of leading rows of weight that are tokens; default all. The rest
            is padding.
        shard: the rows that weight and bias are of a vocabulary-parallel head, see
            parallel.VocabShard; hidden is then the same on all ranks, and so are logits and losses.
            A DTensor that is split by rows brings its own.
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

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions and V: the shape that materialize() would return."""
        return torch.Size((*self.hidden.shape[:-1], self._vocab))

    @property
    def requires_grad(self) -> bool:
        """Whether a loss of these logits has a gradient."""
        operands = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)

    def __getitem__(self, index: Any) -> "LazyLogits":
        """Select rows: an index of the leading dimensions, such as a mask of tokens."""
        parts = index if isinstance(index, tuple) else (index,)
        rest = () if any(part is Ellipsis for part in parts) else (...,)
        try:  # hidden's last dimension is none of the logits'
            hidden = self.hidden[(*parts, *rest, slice(None))]
        except (IndexError, TypeError) as error:  # the former ends an iteration
            raise type(error)(
                f"index: expected one of rows of {tuple(self.hidden.shape[:-1])}, such as a mask "
                f"of tokens, got one that does not fit ({error})"
            ) from error
        return replace(self, hidden=hidden)

    def detach(self) -> "LazyLogits":
        """The same logits without gradient, as a teacher's."""
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
            entropy: also give the row's entropy, from the same pass, detached.
            chunk_bytes: most memory for logits at a time; default by the device.
            backend: "auto", or a name of available_backends().

        Raises:
            TypeError, ValueError: k is out of range, the backend is missing, or an option is of
                another type.
        """
        check_k(k, self._vocab)
        check_flags(entropy=entropy)
        check_execution(chunk_bytes, backend)
        flat = self.flat().local()
        own = min(k, flat._vocab)
        values, ids, tail, row_entropy = linear_topk(
            flat.hidden,
            flat.weight,
            flat.bias,
            own,
            *flat._scalars(),
            entropy,
            chunk_bytes,
            backend,
        )
        rows = flat._sparse(values, ids, tail, row_entropy if entropy else None)
        if self.shard is not None:
            rows = self.shard.merge_topk(rows, k, self._vocab)
        return self._unflatten(rows)

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
            tail: False computes N * K dot products only, for losses that renormalise on S.
            entropy: also give the row's entropy, detached; needs tail=True.
            chunk_bytes, backend: as in topk.

        Raises:
            ValueError: ids do not fit hidden or are not integers; entropy without tail.
        """
        check_ids(ids, self.hidden)
        check_flags(tail=tail, entropy=entropy)
        check_execution(chunk_bytes, backend)
        if entropy and not tail:
            raise ValueError("entropy: it needs a pass over the vocabulary; gather with tail=True")
        flat = self.flat().local()
        flat_ids = own_ids = ids.reshape(-1, ids.shape[-1])
        if self.shard is not None:
            own_ids = self.shard.local_ids(flat_ids, self._vocab)
        options = (*flat._scalars(), tail, entropy, chunk_bytes, backend)
        values, row_tail, row_entropy = linear_gather(
            flat.hidden, flat.weight, flat.bias, own_ids, *options
        )
        rows = flat._sparse(
            values, own_ids, row_tail if tail else None, row_entropy if entropy else None
        )
        if self.shard is not None:
            rows = self.shard.merge_given(rows, flat_ids, self._vocab)
        # Keep the caller's own tensor: `teacher.gather(s.ids).ids is s.ids` proves the supports
        # equal.
        return replace(self._unflatten(rows), ids=ids)

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
            ignore_index: the target that stands for no target.
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
        flat = self.flat().local()
        dtype = accumulator_dtype(flat.hidden, flat.weight)
        with torch.autocast(flat.hidden.device.type, enabled=False):
            raw = flat.hidden.to(dtype) @ flat.weight[: flat._vocab].to(dtype).t()
            logits = flat.head.logits(flat.head.scores(raw, 0))
        if self.shard is not None:
            logits = self.shard.merge_rows(logits, self._vocab)
        return logits.reshape(self.shape)

    def flat(self) -> "LazyLogits":
        """The same logits with hidden as [N, D]; under autocast all operands in its dtype."""
        hidden, weight, bias = (
            self.hidden.reshape(-1, self.hidden.shape[-1]),
            self.weight,
            self.bias,
        )
        device_type = hidden.device.type
        if (
            torch.is_autocast_enabled(device_type)
            and accumulator_dtype(hidden, weight) != torch.float64
        ):
            dtype = torch.get_autocast_dtype(device_type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def local(self, shard: VocabShard | None = None) -> "LazyLogits":
        """The rows of the head that this rank has, as a head of its own; dhidden is summed over the
        ranks. Without a shard, which may be that of another head, all of it.
        """
        weight, bias, shard = self.weight, self.bias, self.shard or shard
        if shard is None:
            return self
        rows = shard.rows(self._vocab)
        if self.shard is None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        hidden, size = shard.sum_gradient(self.hidden), rows.stop - rows.start
        if size == 0:
            # A rank without a token takes part all the same, with one that has no mass; it is made
            # of the weight, which so has a gradient as on the other ranks.
            nothing = weight.new_zeros(0) if bias is None else bias[:0]
            bias = functional.pad(nothing, (0, 1), value=-torch.inf)
            weight = functional.pad(weight[:0], (0, 0, 0, 1))
            return LazyLogits(hidden, weight, bias, temperature=self.temperature)
        return replace(self, hidden=hidden, weight=weight, bias=bias, vocab_size=size, shard=None)

    @property
    def head(self) -> Head:
        """The operands without the hidden states, for the driver."""
        return Head(self.weight, self.bias, *self._scalars())

    @property
    def _vocab(self) -> int:
        assert self.vocab_size is not None  # __post_init__ set it
        return self.vocab_size

    def _scalars(self) -> tuple[float | None, float, float, int]:
        softcap = None if self.softcap is None else float(self.softcap)
        return softcap, float(self.scale), float(self.temperature), self._vocab

    def _sparse(
        self, values: Tensor, ids: Tensor, tail: Tensor | None, entropy: Tensor | None
    ) -> SparseLogits:
        entropy = None if entropy is None else entropy.detach()
        return SparseLogits(values, ids, tail, self._vocab, float(self.temperature), entropy)

    def _unflatten(self, rows: SparseLogits) -> SparseLogits:
        """[N, ...] as [..., ...]."""
        leading = self.hidden.shape[:-1]
        return rows.map(lambda tensor: tensor.reshape((*leading, *tensor.shape[1:])))

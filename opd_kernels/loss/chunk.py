"""A chunk of logits [c, V] as a source of SparseLogits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues, RowState
from opd_kernels.backends.head import Head
from opd_kernels.linear.sparse import canonical_ids
from opd_kernels.parallel import VocabShard
from opd_kernels.sparse_logits import SparseLogits


@dataclass
class LogitsChunk:
    """A chunk of raw products [c, V] as a source of SparseLogits; the last made is the leaf. Where
    the head is vocabulary-parallel, chunk and leaf are of this rank's rows, vocab_size is of all.
    """

    raw: Tensor
    head: Head
    epilogues: Epilogues
    entropy: bool
    vocab_size: int
    shard: VocabShard | None = None
    leaf: SparseLogits | None = None

    def topk(self, k: int) -> SparseLogits:
        tokens, columns = self.raw.shape
        state = RowState.for_topk(tokens, min(k, columns), self.entropy, like=self.raw)
        sparse = self._reduce(state)
        return sparse if self.shard is None else self.shard.merge_topk(sparse, k, self.vocab_size)

    def gather(self, ids: Tensor) -> SparseLogits:
        own = ids if self.shard is None else self.shard.local_ids(ids, self.vocab_size)
        canonical = canonical_ids(own, self.head.vocab_size)
        sparse = self._reduce(RowState.for_ids(canonical, self.entropy, like=self.raw))
        if self.shard is not None:
            sparse = self.shard.merge_given(sparse, ids, self.vocab_size)
        return replace(sparse, ids=ids)

    def whole_rows(self, rows: slice) -> SparseLogits:
        """Some rows with S = V; their values are a leaf."""
        logits = self.head.logits(self.head.scores(self.raw[rows], 0)).detach().requires_grad_()
        ids = torch.arange(self.head.vocab_size, device=logits.device).expand(logits.shape)
        nothing = logits.new_full(logits.shape[:-1], -torch.inf)
        entropy = (
            None if self.leaf is None or self.leaf.entropy is None else self.leaf.entropy[rows]
        )
        return SparseLogits(
            logits, ids, nothing, self.head.vocab_size, self.head.temperature, entropy
        )

    def _reduce(self, state: RowState) -> SparseLogits:
        self.epilogues.update(self.raw, 0, self.head, state)
        state.close()
        entropy = state.entropy() if self.entropy else None
        self.leaf = SparseLogits(
            state.values.requires_grad_(),
            state.ids,
            state.tail().requires_grad_(),
            self.head.vocab_size,
            self.head.temperature,
            entropy,
        )
        return self.leaf

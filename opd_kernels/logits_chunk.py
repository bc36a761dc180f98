"""A chunk of logits [c, V] as a source of SparseLogits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_kernels.backends import Epilogues, RowState
from opd_kernels.head import Head
from opd_kernels.sparse import canonical_ids
from opd_kernels.sparse_logits import SparseLogits


@dataclass
class LogitsChunk:
    """A chunk of raw products [c, V] as a source of SparseLogits; the last made is the leaf."""

    raw: Tensor
    head: Head
    epilogues: Epilogues
    entropy: bool
    leaf: SparseLogits | None = None

    def topk(self, k: int) -> SparseLogits:
        return self._reduce(RowState.for_topk(self.raw.shape[0], k, self.entropy, like=self.raw))

    def gather(self, ids: Tensor) -> SparseLogits:
        canonical = canonical_ids(ids, self.head.vocab_size)
        sparse = self._reduce(RowState.for_ids(canonical, self.entropy, like=self.raw))
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

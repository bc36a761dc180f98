"""support="full": the loss of whole rows, with the teacher's logits beside the student's.

The package's own divergences are one epilogue on the pair of chunks. Any other objective sees S = V
a few rows at a time, and is differentiated by autograd.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues, pair_gradient, pair_sums, row_blocks
from opd_kernels.backends.records import Chunk
from opd_kernels.derivatives import refuse_other_sources
from opd_kernels.loss.objective import Objective, jsd_beta, per_token_loss
from opd_kernels.parallel import VocabShard
from opd_kernels.sparse_logits import SparseLogits, have_same_temperature, trusted

# A user's objective has temporaries of about a dozen tensors [rows, V]; this bounds one of them.
_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class ChunkPair:
    """The raw products [c, V] of both models, and both models on the K reported ids."""

    student: Chunk
    teacher: Chunk
    on_support: tuple[SparseLogits, SparseLogits]

    def losses(
        self, objective: Objective, upstream: Tensor | None, out: Tensor, epilogues: Epilogues
    ) -> Tensor:
        """The loss [c] of each row over the whole vocabulary.

        Given upstream [c], write upstream * dloss/draw to out [c, V], which may be the student's
        own chunk, or of a 16-bit dtype.
        """
        beta, student, teacher = jsd_beta(objective), self.student, self.teacher
        same_scale = have_same_temperature(student.head, teacher.head)
        if beta is not None and same_scale and student.raw.dtype == teacher.raw.dtype:
            return epilogues.divergence(student, teacher, beta, upstream, out)
        raw = student.raw
        rows = max(1, _BLOCK_BYTES // (raw.shape[1] * raw.element_size()))
        blocks = [slice(first, first + rows) for first in range(0, max(1, raw.shape[0]), rows)]
        return torch.cat([self._by_autograd(objective, upstream, out, block) for block in blocks])

    def shard_losses(
        self, objective: Objective, upstream: Tensor | None, out: Tensor, shard: VocabShard
    ) -> Tensor:
        """As `losses`, where the chunks hold this rank's rows of a vocabulary-parallel head.

        Works for the package's own divergences only. Each rank computes its sums over V in
        PyTorch, and the ranks add them.
        """
        beta = jsd_beta(objective)
        assert beta is not None  # refusals._check_shards refuses other objectives
        blocks = list(row_blocks(self.student.raw)) or [slice(0, 0)]
        sums = [torch.stack(pair_sums(*self._log_probs(rows)[1:], beta)[:2]) for rows in blocks]
        loss, mean = shard.sum(torch.cat(sums, dim=1))
        if upstream is None:
            return loss
        for rows in blocks:
            scores, log_p, log_q = self._log_probs(rows)
            _, _, w = pair_sums(log_p, log_q, beta)
            dlogits = pair_gradient(log_p, log_q, beta, w, mean[rows])
            dlogits.mul_(upstream[rows, None]).masked_fill_((upstream[rows] == 0)[:, None], 0.0)
            derivative = self.student[rows].head.derivative(scores)
            torch.mul(dlogits, derivative, out=out[rows])
        return loss

    def _log_probs(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Student's scores, and both models' log-probabilities at this rank's columns."""
        student, teacher = self.student[rows], self.teacher[rows]
        lse_p, lse_q = (sparse.lse[rows, None] for sparse in self.on_support)
        scores = student.scores()
        log_p = student.head.logits(scores) - lse_p
        return scores, log_p, teacher.head.logits(teacher.scores()) - lse_q

    def _by_autograd(
        self, objective: Objective, upstream: Tensor | None, out: Tensor, rows: slice
    ) -> Tensor:
        student, teacher = self.on_support
        block = self.student[rows]
        with torch.set_grad_enabled(upstream is not None):
            s = _whole_rows(block, rows, student.entropy)
            s.values.requires_grad_(upstream is not None)
            t = _whole_rows(self.teacher[rows], rows, teacher.entropy)
            per_token = per_token_loss(objective, s, t)
        if upstream is not None:
            refuse_other_sources(per_token, s.values)
            dlogits = torch.autograd.grad(per_token, s.values, upstream[rows])[0]
            dlogits.masked_fill_((upstream[rows] == 0)[:, None], 0.0)
            torch.mul(dlogits, block.head.derivative(block.scores()), out=out[rows])
        return per_token.detach()


def _whole_rows(chunk: Chunk, rows: slice, entropy: Tensor | None) -> SparseLogits:
    """A chunk of some rows as SparseLogits with S = V."""
    logits, head = chunk.head.logits(chunk.scores()).detach(), chunk.head
    ids = torch.arange(head.vocab_size, device=logits.device).expand(logits.shape)
    nothing = logits.new_full(logits.shape[:-1], -torch.inf)
    entropy = None if entropy is None else entropy[rows]
    return trusted(logits, ids, nothing, head.vocab_size, head.temperature, entropy)

"""support="full": the loss of whole rows, with the teacher's logits beside the student's.

The package's own divergences are one epilogue on the pair of chunks. Any other objective sees S = V
a few rows at a time, and is differentiated by autograd.
"""

import torch
from torch import Tensor

from opd_kernels.backends.torch import pair_gradient, pair_sums, row_blocks
from opd_kernels.loss.chunk import LogitsChunk
from opd_kernels.loss.objective import Objective, jsd_beta, per_token_loss

# An objective's temporaries: about a dozen tensors of [rows, V].
_BLOCK_BYTES = 2 << 20


def full_losses(
    ours: LogitsChunk,
    theirs: LogitsChunk,
    objective: Objective,
    upstream: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The loss [c] of each row over all of V.

    Given upstream [c], it writes upstream * dloss / draw to out [c, V], which may be ours.raw, used
    up, or of a 16-bit dtype.
    """
    beta = jsd_beta(objective)
    same_scale = ours.head.temperature == theirs.head.temperature
    if beta is not None and same_scale and ours.raw.dtype == theirs.raw.dtype:
        return ours.epilogues.divergence(
            ours.raw, ours.head, theirs.raw, theirs.head, beta, upstream, out
        )
    rows = max(1, _BLOCK_BYTES // (ours.raw.shape[1] * ours.raw.element_size()))
    blocks = [slice(first, first + rows) for first in range(0, max(1, ours.raw.shape[0]), rows)]
    return torch.cat([_by_autograd(ours, theirs, objective, upstream, out, x) for x in blocks])


def shard_losses(
    ours: LogitsChunk,
    theirs: LogitsChunk,
    objective: Objective,
    upstream: Tensor | None,
    out: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
) -> Tensor:
    """As full_losses for the rows of the head that this rank has, given the logsumexp [c] of all of
    them; of the package's own divergences, whose sums over V are summed over the ranks. In PyTorch
    on every backend.
    """
    beta, shard = jsd_beta(objective), ours.shard
    assert beta is not None  # check_shards refuses others
    assert shard is not None
    blocks = list(row_blocks(ours.raw)) or [slice(0, 0)]

    def pair(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        scores = ours.head.scores(ours.raw[rows], 0)
        log_p = ours.head.logits(scores) - lse[rows, None]
        log_q = theirs.head.logits(theirs.head.scores(theirs.raw[rows], 0))
        return scores, log_p, log_q - teacher_lse[rows, None]

    sums = [torch.stack(pair_sums(*pair(rows)[1:], beta)[:2]) for rows in blocks]
    loss, mean = shard.sum(torch.cat(sums, dim=1))
    if upstream is None:
        return loss
    for rows in blocks:
        scores, log_p, log_q = pair(rows)
        _, _, w = pair_sums(log_p, log_q, beta)
        dlogits = pair_gradient(log_p, log_q, beta, w, mean[rows])
        dlogits.mul_(upstream[rows, None]).masked_fill_((upstream[rows] == 0)[:, None], 0.0)
        torch.mul(dlogits, ours.head.derivative(scores), out=out[rows])
    return loss


def _by_autograd(
    ours: LogitsChunk,
    theirs: LogitsChunk,
    objective: Objective,
    upstream: Tensor | None,
    out: Tensor,
    rows: slice,
) -> Tensor:
    with torch.set_grad_enabled(upstream is not None):
        s = ours.whole_rows(rows)
        per_token = per_token_loss(objective, s, theirs.whole_rows(rows).detach())
    if upstream is not None:
        dlogits = torch.autograd.grad(per_token, s.values, upstream[rows])[0]
        dlogits.masked_fill_((upstream[rows] == 0)[:, None], 0.0)
        scores = ours.head.scores(ours.raw[rows], 0)
        torch.mul(dlogits, ours.head.derivative(scores), out=out[rows])
    return per_token.detach()

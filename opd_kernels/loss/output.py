"""DistillationOutput, which distillation_loss returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels.sparse_logits import SparseLogits, TrustedSparseLogits


class DistillationOutput(NamedTuple):
    """The loss, and the detached values that it was computed from, for logging.

    With compact=True a token of weight 0 is not computed: its loss is 0, its slots are empty
    (id -1) and its tail is 0.

    Attributes:
        loss: scalar; [...] with reduction="none".
        per_token: [...] the loss of each token, unweighted.
        student: the student on the support.
        teacher: the teacher on the same ids.
        dropped: [...] probability that gradient_filter left out of the gradient; None without one.
    """

    loss: Tensor
    per_token: Tensor
    student: SparseLogits
    teacher: SparseLogits
    dropped: Tensor | None = None


def restore(
    output: DistillationOutput, kept: Tensor | None, leading: torch.Size
) -> DistillationOutput:
    """Bring the results of the kept tokens back to the caller's leading shape."""
    if kept is None and len(leading) == 1:
        return output

    def spread(tensor: Tensor, empty: float) -> Tensor:
        if kept is not None:
            full = tensor.new_full((leading.numel(), *tensor.shape[1:]), empty)
            tensor = full.index_copy(0, kept, tensor)
        return tensor.reshape((*leading, *tensor.shape[1:]))

    def spread_sparse(sparse: SparseLogits) -> SparseLogits:
        return TrustedSparseLogits(
            spread(sparse.values, -torch.inf),
            spread(sparse.ids, -1),
            None if sparse.tail is None else spread(sparse.tail, 0.0),
            sparse.vocab_size,
            sparse.temperature,
            None if sparse.entropy is None else spread(sparse.entropy, 0.0),
        )

    return DistillationOutput(
        output.loss if output.loss.dim() == 0 else spread(output.loss, 0.0),
        spread(output.per_token, 0.0),
        spread_sparse(output.student),
        spread_sparse(output.teacher),
        None if output.dropped is None else spread(output.dropped, 0.0),
    )

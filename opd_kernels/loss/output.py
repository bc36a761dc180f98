"""DistillationOutput, which distillation_loss returns."""

from typing import NamedTuple

from torch import Tensor

from opd_kernels.sparse_logits import SparseLogits


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

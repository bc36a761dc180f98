"""TopKDistillationLoss: distillation_loss as an nn.Module."""

from torch import Tensor, nn

from opd_kernels.divergences import reverse_kl
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.distill import distillation_loss
from opd_kernels.loss.objective import Objective
from opd_kernels.loss.options import Missing, Support
from opd_kernels.loss.output import DistillationOutput
from opd_kernels.sparse_logits import SparseLogits


class TopKDistillationLoss(nn.Module):
    """distillation_loss as a module with fixed options.

    Args:
        options: the keyword arguments of distillation_loss except token_weights and denominator.
    """

    def __init__(
        self,
        *,
        k: int = 20,
        support: Support = "student",
        objective: Objective = reverse_kl,
        reduction: str = "mean",
        method: str = "auto",
        missing: Missing = "error",
        entropy: bool = False,
        compact: bool = True,
        chunk_bytes: int | None = None,
        backend: str = "auto",
        gradient_filter: float | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }

    def forward(
        self,
        student: LazyLogits,
        teacher: LazyLogits | SparseLogits,
        token_weights: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> DistillationOutput:
        """As distillation_loss."""
        return distillation_loss(
            student, teacher, token_weights=token_weights, denominator=denominator, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

"""The options of a loss, and the tokens on which it is computed."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from opd_kernels.linear.operators import FlatLogits
from opd_kernels.loss.objective import Objective
from opd_kernels.sparse_logits import SparseLogits

Support = Literal["student", "teacher", "union", "intersection", "full"]
Missing = Literal["error", "drop"]


@dataclass(frozen=True)
class LossOptions:
    """The options of distillation_loss by name, checked; the backend is resolved."""

    k: int
    support: Support | Tensor
    objective: Objective
    reduction: str
    method: str
    missing: str
    entropy: bool
    compact: bool
    chunk_bytes: int | None
    backend: str
    gradient_filter: float | None
    full: bool  # whether S is the whole vocabulary


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a loss: flat operands of both models, checked and on one vocabulary.

    The teacher has no gradient.
    """

    student: FlatLogits
    teacher: FlatLogits | SparseLogits
    support: str | Tensor  # a name, or ids [N, K]
    weights: Tensor | None  # [N] in the dtype of the loss; None for weights of 1
    options: LossOptions

"""The operands of a language-model head, as the driver and the epilogues see them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Everything that turns a hidden state into final logits.

    z = softcap(scale * (hidden @ weight.T + bias)) / temperature over the first `vocab_size` rows
    of `weight`, with softcap(x) = softcap * tanh(x / softcap). The scalars belong to the epilogues:
    folding them into a 16-bit operand would round every logit.
    """

    weight: Tensor  # [V_padded, D]
    bias: Tensor | None  # [V_padded]
    softcap: float | None
    scale: float
    temperature: float
    vocab_size: int

    @property
    def factors(self) -> tuple[float, float]:
        """(inner, outer) of z = outer * tanh(inner * score), or of z = outer * score without a
        softcap: what a kernel takes of the three scalars.
        """
        if self.softcap is None:
            return 1.0, self.scale / self.temperature
        return self.scale / self.softcap, self.softcap / self.temperature

    def scores(self, raw: Tensor, first_id: int) -> Tensor:
        """raw [n, v] plus the bias of columns [first_id, first_id + v)."""
        if self.bias is None:
            return raw
        return raw + self.bias[first_id : first_id + raw.shape[1]].to(raw.dtype)

    def logits(self, scores: Tensor) -> Tensor:
        """The final logits z of scores = hidden @ weight.T + bias; a new tensor, differentiable."""
        inner, outer = self.factors
        return scores * outer if self.softcap is None else torch.tanh(scores * inner) * outer

    def derivative(self, scores: Tensor) -> Tensor | float:
        """dz/dscores. 1 - tanh^2 cancels where the cap saturates; 4 e / (1 + e)^2 does not."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        e = torch.exp(scores.abs() * (-2.0 * abs(self.scale) / self.softcap))
        return (4.0 * factor) * e / (1.0 + e).square()

    def rows(self, first_id: int, last_id: int) -> Tensor:
        """Rows [first_id, last_id) of the weight, [v, D]."""
        return self.weight[first_id:last_id]


def accumulator_dtype(*operands: Tensor) -> torch.dtype:
    """The dtype of logits, tails and losses: float64 if any operand has it, else float32."""
    has_float64 = any(operand.dtype == torch.float64 for operand in operands)
    return torch.float64 if has_float64 else torch.float32

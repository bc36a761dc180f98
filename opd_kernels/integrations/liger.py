"""Liger-Kernel's fused distillation losses by name and call signature, computed by this package.

    from opd_kernels.integrations.liger import LigerFusedLinearJSDLoss

Where the two vocabularies differ in size, both are cut to the smaller: Liger-Kernel gives the added
rows of the student the logit 0, and with it probability.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opd_kernels.checks import (
    check_beta,
    check_flags,
    check_int,
    check_number,
    check_temperature,
    check_token_ids,
)
from opd_kernels.divergences import jsd
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.distill import distillation_loss


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * cross-entropy + weight_soft_loss * JSD, a mean over the labels that count.

    Args:
        weight_hard_loss: of the cross-entropy of the labels, at temperature 1.
        weight_soft_loss: of the generalised JSD, see divergences.jsd.
        beta: weight of the teacher in the mixture; 0 is the forward KL, 1 the reverse KL.
        ignore_index: the label of tokens without a loss.
        temperature: of both models in the JSD.
        compiled, chunk_size: taken and not needed; chunks are planned by cost.
        return_soft_hard_loss: return (loss, soft, hard) and not the loss alone.
        **options: of distillation_loss, such as support="student", k=20; default support="full".
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_number("weight_hard_loss", weight_hard_loss)
        check_number("weight_soft_loss", weight_soft_loss)
        check_beta("beta", beta)
        check_int("ignore_index", ignore_index)
        check_temperature(temperature)
        check_flags(return_soft_hard_loss=return_soft_hard_loss)
        self.weights = weight_hard_loss, weight_soft_loss
        self.ignore_index, self.temperature = ignore_index, temperature
        self.returns_parts = return_soft_hard_loss
        self.options: dict[str, Any] = {"support": "full", "objective": partial(jsd, beta=beta)}
        self.options |= options

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of student_input [N, D] against teacher_input [N, D'], with labels [N]."""
        student = _lazy("student", student_input, student_weight, student_bias)
        teacher = _lazy("teacher", teacher_input, teacher_weight, teacher_bias)
        check_token_ids("true_labels", true_labels)
        _check_rows(student, teacher, "true_labels", true_labels)
        return self.loss_of(student, teacher, true_labels)

    def loss_of(self, student: LazyLogits, teacher: LazyLogits, labels: Tensor) -> Any:
        """As forward, of operands that are checked."""
        counted = labels != self.ignore_index
        count = counted.sum().clamp_min(1)
        pair = (replace(x, temperature=self.temperature) for x in (student, teacher))
        every = self.options | {"token_weights": counted.float(), "denominator": count}
        loss = student.hidden.new_zeros((), dtype=torch.float32)
        parts = {}
        for name, weight in zip(("hard", "soft"), self.weights, strict=True):
            if weight == 0 and not self.returns_parts:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                if name == "soft":
                    parts[name] = distillation_loss(*pair, **every).loss
                else:
                    log_probs = student.log_prob(labels, ignore_index=self.ignore_index)
                    parts[name] = -log_probs.sum() / count
            if weight != 0:
                loss = loss + weight * parts[name]
        if not self.returns_parts:
            return loss
        return loss, parts["soft"], parts["hard"]


class LigerFusedLinearJSD(nn.Module):
    """The generalised JSD, a mean over the labels that count, or over all tokens without labels.

    Args:
        jsd_beta, ignore_index, temperature, **options: as in LigerFusedLinearJSDLoss.
        accum_dtype: taken and not needed; sums are of float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_beta("jsd_beta", jsd_beta)
        self.ignore_index = ignore_index
        self.loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=jsd_beta,
            ignore_index=ignore_index,
            temperature=temperature,
            **options,
        )

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of student_input [N, D] against teacher_input [N, D'], labels [N] or none."""
        student = _lazy("student", student_input, student_weight, None)
        teacher = _lazy("teacher", teacher_input, teacher_weight, None)
        _check_rows(student, teacher, "shift_labels", shift_labels)
        if shift_labels is None:
            shape = student_input.shape[:-1]
            shift_labels = student_input.new_full(shape, self.ignore_index + 1, dtype=torch.long)
        return self.loss.loss_of(student, teacher, shift_labels)


def _lazy(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """LazyLogits whose messages name this module's arguments."""
    try:
        return LazyLogits(hidden, weight, bias)
    except (TypeError, ValueError) as error:
        names = f"{model}_input, {model}_weight, {model}_bias"
        raise type(error)(f"{names}: as hidden, weight and bias: {error}") from error


def _check_rows(student: LazyLogits, teacher: LazyLogits, name: str, labels: Tensor | None) -> None:
    """Raise unless teacher and labels are of the student's tokens."""
    hidden = student.hidden
    leading, device = tuple(hidden.shape[:-1]), hidden.device
    rows = {"teacher_input": teacher.hidden[..., 0]}
    if labels is not None:
        check_token_ids(name, labels)
        rows[name] = labels
    for other, tensor in rows.items():
        if tensor.shape != leading or tensor.device != device:
            raise ValueError(
                f"{other}, student_input: expected the same tokens, {leading} on {device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )

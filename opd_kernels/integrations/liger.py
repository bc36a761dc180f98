"""Drop-in replacements for Liger-Kernel's fused distillation losses, with the same names and calls.

    from opd_kernels.integrations.liger import LigerFusedLinearJSDLoss

If the vocabularies differ in size, both are cut to the smaller one. Liger-Kernel pads the student
with logits of 0 instead, which have probability.
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
    """Weighted sum of the labels' cross-entropy and the generalised JSD of student and teacher,
    averaged over the tokens that are not ignored.

    Args:
        weight_hard_loss: weight of the cross-entropy of the labels, at temperature 1.
        weight_soft_loss: weight of the generalised JSD, see divergences.jsd.
        beta: weight of the teacher in the mixture; 0 is the forward KL, 1 the reverse KL.
        ignore_index: label of tokens without a loss.
        temperature: temperature of both models in the JSD.
        compiled, chunk_size: accepted for compatibility and ignored; chunk sizes are computed.
        return_soft_hard_loss: return (loss, soft loss, hard loss) instead of the loss alone.
        **options: options of distillation_loss, such as support="student" and k=20. The default is
            support="full".
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
        """Return the loss.

        Args:
            student_input: [N, D] hidden states of the student.
            student_weight: [V, D] weight of the student's head.
            teacher_input: [N, D'] hidden states of the teacher.
            teacher_weight: [V', D'] weight of the teacher's head.
            true_labels: [N] label of each token.
            student_bias: [V] bias of the student's head, if it has one.
            teacher_bias: [V'] bias of the teacher's head, if it has one.

        Returns:
            The scalar loss, or (loss, soft loss, hard loss) with return_soft_hard_loss.
        """
        student = _lazy("student", student_input, student_weight, student_bias)
        teacher = _lazy("teacher", teacher_input, teacher_weight, teacher_bias)
        check_token_ids("true_labels", true_labels)
        _check_rows(student, teacher, "true_labels", true_labels)
        return self._loss(student, teacher, true_labels)

    def _loss(self, student: LazyLogits, teacher: LazyLogits, labels: Tensor) -> Any:
        """Same as forward, for operands that are already checked."""
        counted = labels != self.ignore_index
        count = counted.sum().clamp_min(1)
        pair = (replace(x, temperature=self.temperature) for x in (student, teacher))
        options = self.options | {"token_weights": counted.float(), "denominator": count}
        loss = student.hidden.new_zeros((), dtype=torch.float32)
        parts = {}
        for name, weight in zip(("hard", "soft"), self.weights, strict=True):
            if weight == 0 and not self.returns_parts:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                if name == "soft":
                    parts[name] = distillation_loss(*pair, **options).loss
                else:
                    log_probs = student.log_prob(labels, ignore_index=self.ignore_index)
                    parts[name] = -log_probs.sum() / count
            if weight != 0:
                loss = loss + weight * parts[name]
        if not self.returns_parts:
            return loss
        return loss, parts["soft"], parts["hard"]


class LigerFusedLinearJSD(nn.Module):
    """Generalised JSD of student and teacher, averaged over the tokens that are not ignored, or
    over all tokens if there are no labels.

    Args:
        jsd_beta: same as beta in LigerFusedLinearJSDLoss.
        ignore_index, temperature, **options: same as in LigerFusedLinearJSDLoss.
        accum_dtype: accepted for compatibility and ignored; sums are accumulated in float32.
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
        """Return the scalar loss. Args are those of LigerFusedLinearJSDLoss.forward, where
        shift_labels [N] are the labels, if any.
        """
        student = _lazy("student", student_input, student_weight, None)
        teacher = _lazy("teacher", teacher_input, teacher_weight, None)
        _check_rows(student, teacher, "shift_labels", shift_labels)
        if shift_labels is None:
            shape = student_input.shape[:-1]
            shift_labels = student_input.new_full(shape, self.ignore_index + 1, dtype=torch.long)
        return self.loss._loss(student, teacher, shift_labels)


def _lazy(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """Return LazyLogits; errors name this module's arguments."""
    try:
        return LazyLogits(hidden, weight, bias)
    except (TypeError, ValueError) as error:
        names = f"{model}_input, {model}_weight, {model}_bias"
        raise type(error)(f"{names}: as hidden, weight and bias: {error}") from error


def _check_rows(student: LazyLogits, teacher: LazyLogits, name: str, labels: Tensor | None) -> None:
    """Raise ValueError unless teacher and labels have the student's tokens and device."""
    hidden = student.hidden
    leading, device = tuple(hidden.shape[:-1]), hidden.device
    per_token = {"teacher_input": teacher.hidden[..., 0]}
    if labels is not None:
        check_token_ids(name, labels)
        per_token[name] = labels
    for argument, tensor in per_token.items():
        if tensor.shape != leading or tensor.device != device:
            raise ValueError(
                f"{argument}, student_input: expected the same tokens, {leading} on {device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )

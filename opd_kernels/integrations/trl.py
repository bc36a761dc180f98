"""TRL's distillation trainer with this package's loss, in one line:

    distil_with(trainer, support="student", k=20, objective=reverse_kl)

Everything else, rollouts, batches, logs, stays TRL's.
"""

from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from trl import DistillationTrainer
from trl.trainer import distillation_trainer

from opd_kernels.checks import got
from opd_kernels.divergences import jsd
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.distill import distillation_loss
from opd_kernels.parallel import is_dtensor, plain

_LOSS = "_chunked_divergence_loss"  # what TRL's trainer calls, by this name of its module


def distil_with(trainer: DistillationTrainer, **options: Any) -> DistillationTrainer:
    """Make a trainer compute distillation_loss from hidden states and heads.

    Args:
        trainer: TRL's, before or in training.
        **options: of distillation_loss; default support="full" and the generalised JSD of the
            trainer's beta, which is TRL's own loss.

    Returns:
        The same trainer.

    Raises:
        TypeError: trainer is none of TRL's for distillation.
        RuntimeError: this TRL computes its loss elsewhere.
    """
    if not isinstance(trainer, DistillationTrainer):
        raise TypeError(f"trainer: expected TRL's DistillationTrainer, got {got(trainer)}")
    if not hasattr(distillation_trainer, _LOSS):
        raise RuntimeError(
            f"trl: expected trl.trainer.distillation_trainer to have {_LOSS}, as TRL 1.16 does; "
            "install that version, or call distillation_loss in a trainer of your own"
        )
    compute = trainer._compute_loss

    @wraps(compute)
    def compute_ours(*arguments: Any, **keywords: Any) -> Any:
        with patch.object(distillation_trainer, _LOSS, partial(_loss, options)):
            return compute(*arguments, **keywords)

    trainer._compute_loss = compute_ours
    return trainer


def _loss(
    options: dict[str, Any],
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In place of TRL's: the loss, the sum of the student's entropies, and the number of tokens."""

    def whole(weight: Any, hidden: Tensor) -> Any:
        """FSDP2's, outside the head's forward pass; the gathered one is a master copy."""
        return plain(weight, whole=True).to(hidden.dtype) if is_dtensor(weight) else weight

    if is_dtensor(student_lm_head_weight) and student_lm_head_weight.requires_grad:
        raise ValueError(
            "trl: expected the student's head whole in the forward pass, as accelerate's FSDP2 "
            "leaves it to the root module; its gradient would not be summed over the ranks"
        )
    student = LazyLogits(
        student_hidden_states,
        whole(student_lm_head_weight, student_hidden_states),
        whole(student_lm_head_bias, student_hidden_states),
        student_final_logit_softcapping,
        student_logit_scale,
        temperature,
    )
    teacher = LazyLogits(
        teacher_hidden_states,
        whole(teacher_lm_head_weight, teacher_hidden_states),
        whole(teacher_lm_head_bias, teacher_hidden_states),
        teacher_final_logit_softcapping,
        teacher_logit_scale,
        temperature,
    )
    weights = (completion_mask != 0).float()
    count = weights.sum()
    denominator = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    every: dict[str, Any] = {"support": "full", "objective": partial(jsd, beta=beta)} | options
    every |= {"token_weights": weights, "denominator": denominator, "entropy": True}
    output = distillation_loss(student, teacher, **every)
    assert output.student.entropy is not None
    entropy = torch.where(weights > 0, output.student.entropy, 0.0).sum()
    return output.loss, entropy, count.long()

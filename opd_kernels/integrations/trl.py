"""Use this package's loss in TRL's distillation trainer:

    distil_with(trainer, support="student", k=20, objective=reverse_kl)

TRL continues to do everything else, such as rollouts, batches and logging.
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

_LOSS = "_chunked_divergence_loss"  # the function of TRL's module that its trainer calls


def distil_with(trainer: DistillationTrainer, **options: Any) -> DistillationTrainer:
    """Make a trainer compute its loss with distillation_loss from hidden states and heads.

    Args:
        trainer: TRL's DistillationTrainer, before or during training.
        **options: options of distillation_loss. The default is support="full" and the generalised
            JSD with the trainer's beta, which is TRL's own loss.

    Returns:
        The same trainer.

    Raises:
        TypeError: trainer is not a DistillationTrainer.
        RuntimeError: the installed TRL has no function to replace.
    """
    if not isinstance(trainer, DistillationTrainer):
        raise TypeError(f"trainer: expected TRL's DistillationTrainer, got {got(trainer)}")
    if not hasattr(distillation_trainer, _LOSS):
        raise RuntimeError(
            f"trl: expected trl.trainer.distillation_trainer to have {_LOSS}, as TRL 1.16 does; "
            "install that version, or call distillation_loss in your own trainer"
        )
    compute_loss = trainer._compute_loss

    @wraps(compute_loss)
    def compute_loss_with_ours(*args: Any, **kwargs: Any) -> Any:
        with patch.object(distillation_trainer, _LOSS, partial(_loss, options)):
            return compute_loss(*args, **kwargs)

    trainer._compute_loss = compute_loss_with_ours
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
    """Replacement of TRL's loss with its signature. Return the loss, the sum of the student's
    entropies and the number of tokens.
    """

    def gather(weight: Any, hidden: Tensor) -> Any:
        """Gather a weight that FSDP2 has sharded again after its forward pass. The shards are the
        master weights, so cast the result to the dtype of the hidden states.
        """
        return plain(weight, whole=True).to(hidden.dtype) if is_dtensor(weight) else weight

    if is_dtensor(student_lm_head_weight) and student_lm_head_weight.requires_grad:
        raise ValueError(
            "trl: expected the student's whole head during the forward pass, got a shard, whose "
            "gradient would not be summed over the ranks; leave the head to FSDP2's root module, "
            "as accelerate does"
        )
    student = LazyLogits(
        student_hidden_states,
        gather(student_lm_head_weight, student_hidden_states),
        gather(student_lm_head_bias, student_hidden_states),
        student_final_logit_softcapping,
        student_logit_scale,
        temperature,
    )
    teacher = LazyLogits(
        teacher_hidden_states,
        gather(teacher_lm_head_weight, teacher_hidden_states),
        gather(teacher_lm_head_bias, teacher_hidden_states),
        teacher_final_logit_softcapping,
        teacher_logit_scale,
        temperature,
    )
    weights = (completion_mask != 0).float()
    count = weights.sum()
    denominator = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    defaults: dict[str, Any] = {"support": "full", "objective": partial(jsd, beta=beta)}
    options = defaults | options
    options |= {"token_weights": weights, "denominator": denominator, "entropy": True}
    output = distillation_loss(student, teacher, **options)
    assert output.student.entropy is not None
    entropy = torch.where(weights > 0, output.student.entropy, 0.0).sum()
    return output.loss, entropy, count.long()

"""The on-policy distillation trainer: roll out, score, learn.

A step is one batch of prompts: sample completions from the student, take the teacher's logits on
the same tokens, and go down the divergence. transformers' Trainer does the rest.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from opd_kernels import LazyLogits, SparseLogits
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.measures.evaluation import Evaluation
from trainer.models.load import Model, load_model
from trainer.models.rollout import Completion
from trainer.models.teacher import LocalTeacher, side_by_side, token_ids
from trainer.stages.objective import OFF_POLICY, build_loss
from trainer.stages.sft import negative_log_likelihood
from trainer.stages.training import CompletionTrainer, Part

TEACHER = "teacher"  # in a checkpoint, beside the student


class _FollowingTeacher(TrainerCallback):
    """Moves the teacher after each optimiser step."""

    def __init__(self, teacher: LocalTeacher, rate: float) -> None:
        self.teacher, self.rate = teacher, rate

    def on_step_end(self, *_: Any, model: Model, **__: Any) -> None:
        self.teacher.follow(model, self.rate)


class OnPolicyDistillationTrainer(CompletionTrainer):
    """Distils teachers into a student, of transformers or PEFT, on the student's own samples."""

    args: DistillationConfig

    def __init__(
        self, model: nn.Module, args: DistillationConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        super().__init__(model, args, data, evaluation)
        self.needs_log_probs = args.max_importance_weight is not None
        self.teachers = evaluation.teachers
        self.loss = build_loss(args)
        # The teacher that is an average of the student's weights.
        self.averages: LocalTeacher | None = None
        for teacher in self.teachers.values():
            if isinstance(teacher, LocalTeacher) and 0 < args.teacher_update_rate < 1:
                self.averages = teacher
                self.add_callback(_FollowingTeacher(teacher, args.teacher_update_rate))
        if args.sft_coef > 0 and not all(p.reference_ids for p in data):
            raise ValueError("sft_coef: expected a completion in every row of train_data")
        if args.samples_differ and self.is_world_process_zero():
            warnings.warn(OFF_POLICY, stacklevel=2)

    def parts(self, completions: list[Completion]) -> list[Part]:
        """The divergence on the samples, and the cross-entropy on the rows' own completions."""
        learned = [c.first(self.args.max_loss_tokens) for c in completions]
        for name, teacher in self.teachers.items():
            teacher.prepare([c for c in learned if c.prompt.teacher == name])
        parts = [Part(learned, self._divergence)]
        if self.args.sft_coef > 0:
            given = [c.prompt for c in completions[:: self.args.completions_per_prompt]]
            references = [Completion(p, p.reference_ids or [], truncated=False) for p in given]
            likelihood = partial(negative_log_likelihood, self.args.temperature)
            parts.append(Part(references, likelihood, self.args.sft_coef))
        return parts

    def _divergence(
        self, model: nn.Module, batch: list[Completion], weights: Tensor, denominator: Tensor
    ) -> Tensor:
        ids, options = token_ids(batch, self.args.device), {"denominator": denominator}
        is_sampled = self.args.takes_sampled_tokens
        if is_sampled:
            options["support"] = ids[:, None]

        def loss_of(student: LazyLogits, teacher: LazyLogits | SparseLogits) -> Tensor:
            token_weights = weights
            if self.args.max_importance_weight is not None:
                sampled = torch.tensor([x for c in batch for x in c.log_probs or []])
                ratio = (student.detach().log_prob(ids) - sampled.to(ids.device)).exp()
                token_weights = weights * ratio.clamp_max(self.args.max_importance_weight)
            output = self.loss(student, teacher, token_weights=token_weights, **options)
            s, t = output.student, output.teacher
            top = s
            if is_sampled or self.args.support not in ("student", "full"):
                top = student.detach().topk(self.args.k, entropy=True)
            if is_sampled:  # the sampled token's own probability is no measure of the support
                s, t = top, _at(teacher, top.ids)
            if weights.any():
                self.sums.add_tokens(s, t)
                self.sums.add_positions(top, teacher, ids, [len(c.ids) for c in batch])
            return output.loss

        teacher = self.teachers[batch[0].prompt.teacher]
        return side_by_side(model, teacher, batch, self.args.temperature, loss_of)

    def save_more(self, checkpoint: Path) -> None:
        """Keep a teacher that moves too."""
        super().save_more(checkpoint)
        # All ranks have a part of a model that is split.
        if self.averages and (self.args.should_save or self.args.distributed_config):
            self.averages.model.save_pretrained(
                checkpoint / TEACHER, is_main_process=self.args.should_save
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *models: nn.Module | None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *models)
        if self.averages:
            path = f"{resume_from_checkpoint}/{TEACHER}"
            saved = load_model(path, "float32", trust_remote_code=self.args.trust_remote_code)
            self.averages.model.load_state_dict(saved.state_dict())


def _at(teacher: LazyLogits | SparseLogits, ids: Tensor) -> SparseLogits:
    if isinstance(teacher, SparseLogits):
        return teacher.at(ids)
    return teacher.gather(ids, entropy=True)

"""On-policy distillation: sample, score with the teacher, minimise a divergence."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from opd_kernels import LazyLogits, SparseLogits
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.measures.evaluation import Evaluation
from trainer.models.load import Model, load_model
from trainer.models.rollout import Completion
from trainer.models.teacher import LocalTeacher, side_by_side
from trainer.stages.objective import OFF_POLICY, build_loss
from trainer.stages.sft import negative_log_likelihood
from trainer.stages.training import CompletionTrainer, MicroBatch, Part

TEACHER = "teacher"  # folder in a checkpoint


class _TeacherUpdate(TrainerCallback):
    """Moves the teacher towards the student after each optimiser step."""

    def __init__(self, teacher: LocalTeacher, rate: float) -> None:
        self.teacher, self.rate = teacher, rate

    def on_step_end(self, *_: Any, model: Model, **__: Any) -> None:
        self.teacher.follow(model, self.rate)


class OnPolicyDistillationTrainer(CompletionTrainer):
    """Distils teachers into a student of transformers or PEFT, on the student's own samples."""

    args: DistillationConfig

    def __init__(
        self, model: nn.Module, args: DistillationConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        super().__init__(model, args, data, evaluation)
        self.teachers = evaluation.teachers
        self.loss = build_loss(args)
        self.moving_teacher: LocalTeacher | None = None  # an average of the student's weights
        if 0 < args.teacher_update_rate < 1:
            (self.moving_teacher,) = evaluation.local.values()
            self.add_callback(_TeacherUpdate(self.moving_teacher, args.teacher_update_rate))
        if args.sft_coef > 0 and not all(p.reference_ids for p in data):
            raise ValueError("sft_coef: expected a completion in every row of train_data")
        if args.samples_differ and self.is_world_process_zero():
            warnings.warn(OFF_POLICY, stacklevel=2)

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """Return samples, with their log-probs for importance weights."""
        completions = super().complete(prompts)
        is_weighted = self.args.max_importance_weight is not None
        return self.with_log_probs(completions) if is_weighted else completions

    def parts(self, completions: list[Completion]) -> list[Part]:
        """Return the divergence on the samples, and the cross-entropy on the rows' completions."""
        learned = [c.first(self.args.max_loss_tokens) for c in completions]
        for name, teacher in self.teachers.items():
            teacher.prepare([c for c in learned if c.prompt.teacher == name])
        parts = [Part(learned, self._divergence)]
        if self.args.sft_coef > 0:
            prompts = [c.prompt for c in completions[:: self.args.completions_per_prompt]]
            references = [Completion(p, p.reference_ids or [], truncated=False) for p in prompts]
            likelihood = partial(negative_log_likelihood, self.args.temperature)
            parts.append(Part(references, likelihood, self.args.sft_coef))
        return parts

    def _divergence(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        ids, is_sampled = batch.ids, self.args.takes_sampled_tokens
        options = {"denominator": batch.denominator}
        if is_sampled:
            options["support"] = ids[:, None]

        def loss_of(student: LazyLogits, teacher: LazyLogits | SparseLogits) -> Tensor:
            weights = batch.weights
            if self.args.max_importance_weight is not None:
                ratio = (student.detach().log_prob(ids) - batch.sampled_log_probs()).exp()
                weights = weights * ratio.clamp_max(self.args.max_importance_weight)
            output = self.loss(student, teacher, token_weights=weights, **options)
            s, t = output.student, output.teacher
            top = s
            if is_sampled or self.args.support not in ("student", "full"):
                top = student.detach().topk(self.args.k, entropy=True)
            if is_sampled:  # report the mass on the top-K, not the sampled token's probability
                s = top
                t = (
                    teacher.at(s.ids)
                    if isinstance(teacher, SparseLogits)
                    else teacher.gather(s.ids)
                )
            if batch.weights.any():
                self.sums.add_tokens(s, t)
                self.sums.add_positions(top, teacher, ids, [len(c.ids) for c in batch.completions])
            return output.loss

        teacher = self.teachers[batch.completions[0].prompt.teacher]
        return side_by_side(model, teacher, batch.completions, self.args.temperature, loss_of)

    def save_more(self, checkpoint: Path) -> None:
        """Save a moving teacher too."""
        super().save_more(checkpoint)
        # Each rank holds a part of a model that is split, so all of them save.
        if self.moving_teacher and (self.args.should_save or self.args.distributed_config):
            self.moving_teacher.model.save_pretrained(
                checkpoint / TEACHER, is_main_process=self.args.should_save
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *models: nn.Module | None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *models)
        if self.moving_teacher:
            path = f"{resume_from_checkpoint}/{TEACHER}"
            saved = load_model(path, "float32", trust_remote_code=self.args.trust_remote_code)
            self.moving_teacher.model.load_state_dict(saved.state_dict())

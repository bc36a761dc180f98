"""On-policy distillation: sample, score with the teacher, minimise a divergence."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from opd_kernels import DistillationOutput, LazyLogits, SparseLogits, distillation_loss
from opd_kernels.divergences import forward_kl, jsd, policy_gradient, reverse_kl
from opd_trainer.config import DistillationConfig, load_function
from opd_trainer.data import Prompt
from opd_trainer.errors import RunStoppedError, convert_errors
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import Model, load_model
from opd_trainer.models.rollout import Completion
from opd_trainer.models.teacher import LocalTeacher
from opd_trainer.stages.sft import negative_log_likelihood
from opd_trainer.stages.training import CompletionTrainer, MicroBatch, Part

TEACHER = "teacher"  # folder in a checkpoint
Objective = Callable[[SparseLogits, SparseLogits], Tensor]  # a loss per token
OFF_POLICY = (
    "Completions are sampled at another temperature than the loss's, or with top_p below 1, so the "
    "loss is not computed for the distribution that they come from: leave out sampling_temperature "
    "and top_p to be on-policy."
)


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
        name, temperature = batch.completions[0].prompt.teacher, self.args.temperature
        teacher = self.teachers[name].logits(batch.completions, temperature)
        ids, is_sampled = batch.ids, self.args.takes_sampled_tokens
        options = {"denominator": batch.denominator}
        if is_sampled:
            options["support"] = ids[:, None]

        def loss_of(student: LazyLogits) -> Tensor:
            weights, now = batch.weights, None
            if self.args.max_importance_weight is not None:
                now = student.detach().log_prob(ids)
                ratio = (now - batch.sampled_log_probs(now)).exp()
                weights = weights * ratio.clamp_max(self.args.max_importance_weight)
            output = self.loss(student, teacher, token_weights=weights, **options)
            s, t = output.student, output.teacher
            top = s
            if is_sampled or self.args.loss_support not in ("student", "full"):
                top = student.detach().topk(self.args.k, entropy=True)
            if is_sampled:  # report the mass on the top-K, not the sampled token's probability
                s = top
                read = teacher.at if isinstance(teacher, SparseLogits) else teacher.gather
                t = read(s.ids)
            if batch.weights.any():
                self.sums.add_tokens(s, t)
                self.sums.add_positions(top, teacher, ids, [len(c.ids) for c in batch.completions])
                if now is None:  # one dot product per token, no pass over the vocabulary
                    now = student.detach().gather(ids[:, None], tail=False).values[:, 0] - top.lse
                self.compare_engine(batch, now)
            return output.loss

        return batch.loss(model, temperature, loss_of)

    def save_more(self, checkpoint: Path) -> None:
        """Save a moving teacher too."""
        super().save_more(checkpoint)
        is_main = self.args.should_save
        # Each rank holds a part of a model that is split, so all of them save.
        if self.moving_teacher and (is_main or self.args.distributed_config):
            self.moving_teacher.model.save_pretrained(checkpoint / TEACHER, is_main_process=is_main)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *models: nn.Module | None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *models)
        if self.moving_teacher:
            path = f"{resume_from_checkpoint}/{TEACHER}"
            saved = load_model(path, "float32", trust_remote_code=self.args.trust_remote_code)
            self.moving_teacher.model.load_state_dict(saved.state_dict())


def build_loss(config: DistillationConfig) -> Callable[..., DistillationOutput]:
    """Return distillation_loss with the config's objective and support; it computes entropies."""
    objectives: dict[str, Objective] = {
        "reverse_kl": partial(reverse_kl, stop_gradient=config.stop_gradient, tail=config.tail),
        "forward_kl": partial(forward_kl, tail=config.tail),
        "jsd": partial(jsd, beta=config.beta, tail=config.tail),
        "policy_gradient": policy_gradient,
    }
    objective = load_function("objective", config.objective, objectives)
    if config.forward_kl_coef > 0:
        if config.support == "student":  # the first k slots of the union
            objective = partial(on_first_slots, objective, config.k)
        other = partial(forward_kl, tail=config.tail)
        mixture = config.forward_kl_coef, config.forward_kl_min_entropy
        objective = partial(add_where_uncertain, objective, other, *mixture)
    if config.max_token_loss is not None:
        objective = partial(clamp, objective, config.max_token_loss)
    options: dict[str, Any] = {"k": config.k, "missing": config.missing, "entropy": True}
    loss = partial(distillation_loss, support=config.loss_support, objective=objective, **options)
    if config.objective in objectives:
        return loss
    expected = f"objective: expected a loss per token of (student, teacher) from {config.objective}"
    return convert_errors(expected, RunStoppedError)(loss)


def add_where_uncertain(
    objective: Objective,
    other: Objective,
    coefficient: float,
    min_entropy: float,
    student: SparseLogits,
    teacher: SparseLogits,
) -> Tensor:
    """Return objective + coefficient * other where the teacher's entropy exceeds min_entropy nats.

    Where the teacher has several answers, a forward KL over its top-K keeps the student from
    choosing one. Over the student's top-K it would not see the answers that the student lacks.
    """
    assert teacher.entropy is not None
    added = torch.where(teacher.entropy > min_entropy, other(student, teacher), 0.0)
    return objective(student, teacher) + coefficient * added


def on_first_slots(
    objective: Objective, k: int, student: SparseLogits, teacher: SparseLogits
) -> Tensor:
    """Return the objective on the first k slots of the support; the other slots join the tail."""
    is_first = torch.arange(student.ids.shape[-1], device=student.ids.device) < k
    mask = is_first.expand(student.ids.shape)
    return objective(student.keep(mask), teacher.keep(mask))


def clamp(
    objective: Objective, maximum: float, student: SparseLogits, teacher: SparseLogits
) -> Tensor:
    """Return the objective, at most `maximum` nats per token; above it there is no gradient."""
    return objective(student, teacher).clamp_max(maximum)

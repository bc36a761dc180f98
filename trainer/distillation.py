"""The on-policy distillation trainer: roll out, score, learn.

A step is one batch of prompts: sample completions from the student, take the teacher's logits on
the same tokens, and go down the divergence. transformers' Trainer does the rest.
"""

import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from opd_kernels import LazyLogits
from trainer.checkpoint import DurableTrainer
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.diagnostics import Sums
from trainer.evaluation import Evaluation
from trainer.models import Model, load_model
from trainer.objective import DRIFT, OFF_POLICY, build_loss
from trainer.rollout import Completion
from trainer.teacher import Teacher, side_by_side

# In a checkpoint, beside the student.
TEACHER, REFERENCES = "teacher", "held_out_completions.json"


class _FollowingTeacher(TrainerCallback):
    """Moves the teacher after each optimiser step."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, *_: Any, model: Model, **__: Any) -> None:
        self.teacher.follow(model)


class OnPolicyDistillationTrainer(DurableTrainer):
    """Distils a teacher into a student, of transformers or PEFT, on the student's own samples.

    The teacher and the sampler are those of the evaluation, which may hold no prompts.
    """

    args: DistillationConfig

    def __init__(
        self, model: nn.Module, args: DistillationConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        collate, tokenizer = list, evaluation.sampler.tokenizer
        super().__init__(model, args, collate, data, evaluation.prompts, tokenizer)
        self.evaluation = evaluation
        self.sampler, self.teacher = evaluation.sampler, evaluation.teacher
        self.loss = build_loss(args)
        self.sums = Sums()  # of the steps since the last log line
        self.teacher.model.to(args.device)
        self.add_callback(_FollowingTeacher(self.teacher))
        if args.samples_differ and self.is_world_process_zero():
            warnings.warn(OFF_POLICY, stacklevel=2)

    def training_step(self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any) -> Tensor:
        """One optimiser step's gradient: roll the prompts out, then learn from the completions."""
        start = time.perf_counter()
        seed = (self.args.seed, self.state.global_step, self.args.process_index)
        prompts = [p for p in inputs for _ in range(self.args.completions_per_prompt)]
        with self.accelerator.autocast():
            completions = self.sampler.sample(self.model, prompts, *seed)
        loss = self.learn(model, completions)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.sums.add(skipped_steps=float(self.is_world_process_zero()))
            # NaN would poison the optimiser's state; under float16 the scaler sees to it.
            if not self.accelerator.scaler:
                model.zero_grad(set_to_none=True)
        self.sums.add(seconds=time.perf_counter() - start)
        return loss

    def save_more(self, checkpoint: Path) -> None:
        """Keep a teacher that moves, and the held-out completions of the one that began."""
        if self.teacher.update_rate > 0:
            self.teacher.model.save_pretrained(checkpoint / TEACHER)
        self.evaluation.save_references(checkpoint / REFERENCES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *models: nn.Module | None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *models)
        checkpoint = Path(resume_from_checkpoint)
        if self.teacher.update_rate > 0:
            saved = load_model(str(checkpoint / TEACHER), "float32")
            self.teacher.model.load_state_dict(saved.state_dict())
        self.evaluation.load_references(checkpoint / REFERENCES)

    def learn(self, model: nn.Module, completions: list[Completion]) -> Tensor:
        """Accumulate the gradient of the mean loss over all ranks' completions; return the loss."""
        model.train()
        self.sums.add_completions(completions)
        learned = self._learned(completions)
        per_token = self.args.aggregation == "token"
        own = float(sum(len(c.ids) for c in learned) if per_token else len(learned))
        denominator = self.accelerator.reduce(torch.tensor(own, device=self.args.device), "sum")
        denominator = denominator.clamp_min(1.0)
        total = torch.zeros((), device=self.args.device)
        # Completions of similar length together, so that little is padded. A rank without any takes
        # part all the same: the others wait for its gradient.
        order = sorted(learned or completions[:1], key=lambda c: -len(c.ids))
        for first in range(0, len(order), self.args.micro_batch_size):
            batch = order[first : first + self.args.micro_batch_size]
            is_last = first + len(batch) == len(order)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                # DDP averages the gradient over the ranks.
                loss = self._loss(model, batch, denominator, bool(learned))
                loss = loss * self.accelerator.num_processes
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _learned(self, completions: list[Completion]) -> list[Completion]:
        """What is learned from of the completions."""
        ended = [c for c in completions if not (self.args.skip_truncated and c.truncated)]
        return [replace(c, ids=c.ids[: self.args.max_loss_tokens]) for c in ended]

    def _loss(
        self, model: nn.Module, batch: list[Completion], denominator: Tensor, counts: bool
    ) -> Tensor:
        """A micro-batch's share of the mean loss; 0, with a gradient of 0, if it does not count."""
        lengths = torch.tensor([len(c.ids) for c in batch], device=self.args.device)
        weights = torch.ones_like(lengths) if self.args.aggregation == "token" else 1.0 / lengths
        weights = weights.repeat_interleave(lengths) * counts
        options = {"token_weights": weights, "denominator": denominator}
        is_sampled = self.args.objective == "policy_gradient"
        if is_sampled:
            ids = [token for completion in batch for token in completion.ids]
            options["support"] = torch.tensor(ids, device=self.args.device)[:, None]

        def loss_of(student: LazyLogits, teacher: LazyLogits) -> Tensor:
            output = self.loss(student, teacher, **options)
            s, t = output.student, output.teacher
            top = s
            if is_sampled or self.args.support not in ("student", "full"):
                top = student.detach().topk(self.args.k, entropy=True)
            if is_sampled:  # the sampled token's own probability is no measure of the support
                s, t = top, teacher.gather(top.ids, entropy=True)
            if counts:
                self.sums.add_tokens(s, t, top, teacher)
            return output.loss

        with self.accelerator.autocast():
            return side_by_side(model, self.teacher, batch, self.args.temperature, loss_of)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training loss comes with the figures of its steps over all ranks."""
        if "loss" in logs:
            ranks = self.accelerator.num_processes
            own = torch.tensor([self.sums[n] for n in Sums.NAMES], device=self.args.device)
            total = Sums(zip(Sums.NAMES, self.accelerator.reduce(own, "sum").tolist(), strict=True))
            self.sums.clear()
            logs |= total.means() | {"skipped_steps": total["skipped_steps"]}
            logs["tokens_per_second"] = total["tokens"] * ranks / total["seconds"]
            drops = self.args.tail == "drop" and self.args.support != "full"
            drops &= self.args.objective != "policy_gradient" and total["scored_tokens"] > 0
            if drops and logs["student_mass"] < 0.95 and self.is_world_process_zero():
                warnings.warn(DRIFT, stacklevel=2)  # shown once
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out measurements of the student as it is, see Evaluation; {} without eval_data."""
        if not self.evaluation.prompts:
            return {}
        with self.accelerator.autocast():
            metrics = self.evaluation.measure(self.model, self.state.global_step)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

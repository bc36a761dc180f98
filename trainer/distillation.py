"""The on-policy distillation trainer: roll out, score, learn.

A step is one batch of prompts: sample completions from the student, take the teacher's logits on
the same tokens, and go down the divergence. transformers' Trainer does the rest.
"""

import time
import warnings
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd_kernels import LazyLogits
from trainer.checkpoint import DurableTrainer
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.diagnostics import completion_sums, means, token_sums
from trainer.evaluation import Evaluation
from trainer.objective import DRIFT, build_loss, drifts
from trainer.rollout import Completion, Sampler
from trainer.teacher import Teacher, side_by_side


class OnPolicyDistillationTrainer(DurableTrainer):
    """Distils a teacher into a student, of transformers or PEFT, on the student's own samples."""

    args: DistillationConfig

    def __init__(
        self,
        model: nn.Module,
        args: DistillationConfig,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
        train_prompts: list[Prompt],
        evaluation: Evaluation,
    ) -> None:
        data = {"train_dataset": train_prompts, "eval_dataset": evaluation.prompts}
        super().__init__(
            model=model, args=args, processing_class=tokenizer, data_collator=list, **data
        )
        self.teacher = teacher
        self.evaluation = evaluation
        self.sampler = Sampler(args, model, tokenizer)
        self.loss = build_loss(args)
        self.skipped_steps = 0
        self._figures: dict[str, float] = {}
        teacher.model.to(args.device)

    def training_step(self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any) -> Tensor:
        """One optimiser step's gradient: roll the prompts out, then learn from the completions."""
        start = time.perf_counter()
        seed = (self.args.seed, self.state.global_step, self.args.process_index)
        loss, sums = self.learn(model, self.sampler.sample(self.model, inputs, *seed))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.skipped_steps += 1  # a NaN would poison the optimiser's state
            model.zero_grad(set_to_none=True)
        self._note_step(sums, time.perf_counter() - start)
        return loss

    def learn(self, model: nn.Module, completions: list[Completion]) -> tuple[Tensor, Counter[str]]:
        """Accumulate the gradient of the mean loss over all ranks' completions.

        Returns the loss, scaled so that its mean over ranks is that mean, and this rank's sums.
        """
        model.train()
        sums = completion_sums(completions)
        unit = "tokens" if self.args.aggregation == "token" else "completions"
        own = torch.tensor(float(sums[unit]), device=self.args.device)
        denominator = self.accelerator.reduce(own, "sum")
        total = torch.zeros((), device=self.args.device)
        # Completions of similar length together, so that little is padded.
        order = sorted(completions, key=lambda c: -len(c.ids))
        for first in range(0, len(order), self.args.micro_batch_size):
            batch = order[first : first + self.args.micro_batch_size]
            is_last = first + len(batch) == len(order)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                # DDP averages the gradient over the ranks.
                loss = self._loss(model, batch, denominator, sums) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            total += loss.detach()
        return total, sums

    def _loss(
        self, model: nn.Module, batch: list[Completion], denominator: Tensor, sums: Counter[str]
    ) -> Tensor:
        """A micro-batch's share of the mean loss; adds its figures to the sums."""
        lengths = torch.tensor([len(c.ids) for c in batch], device=self.args.device)
        weights = torch.ones_like(lengths) if self.args.aggregation == "token" else 1.0 / lengths
        weights = weights.repeat_interleave(lengths)

        def loss_of(student: LazyLogits, teacher: LazyLogits) -> Tensor:
            output = self.loss(student, teacher, token_weights=weights, denominator=denominator)
            sums.update(token_sums(output, teacher, self.args.k))
            return output.loss

        with self.compute_loss_context_manager():
            return side_by_side(model, self.teacher, batch, self.args.temperature, loss_of)

    def _note_step(self, sums: Counter[str], seconds: float) -> None:
        """Keep the step's figures over all ranks for the next log line; warn once of a drift."""
        names = sorted(sums)
        values = torch.tensor([float(sums[n]) for n in names], device=self.args.device)
        total = dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        self._figures = means(total) | {"skipped_steps": self.skipped_steps}
        self._figures["tokens_per_second"] = total["tokens"] / seconds
        if drifts(self.args, self._figures["student_mass"]) and self.is_world_process_zero():
            warnings.warn(DRIFT, stacklevel=2)  # shown once

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, a training step's loss with its figures."""
        super().log(logs | self._figures if "loss" in logs else logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out measurements of the student as it is, see Evaluation."""
        metrics = self.evaluation.measure(self.model, self.state.global_step)
        if metrics:
            self.log(metrics)
        return metrics

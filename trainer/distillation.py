"""The on-policy distillation trainer: roll out, score, learn.

transformers' Trainer keeps the loop, optimiser, schedule, checkpoints and logs. A step is one batch of
prompts: sample completions from the student, take the teacher's logits on the same tokens, and go down
the divergence in micro-batches. Given the completions, it does not matter how they are batched.
"""

import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd_kernels import LazyLogits, distillation_loss
from trainer.checkpoint import DurableTrainer
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.diagnostics import completion_sums, means, token_sums
from trainer.evaluation import Evaluation
from trainer.objective import drift_warning, loss_options
from trainer.rollout import Completion, Sampler
from trainer.teacher import Teacher, side_by_side


class OnPolicyDistillationTrainer(DurableTrainer):
    """Distils a teacher into a student on the student's own samples.

    Args:
        model: the student, a causal language model of transformers or PEFT.
        args: the recipe.
        teacher: what scores the samples.
        tokenizer: the student's.
        train_prompts: what to sample from.
        evaluation: held-out measurements, or None.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: nn.Module,
        args: DistillationConfig,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
        train_prompts: list[Prompt],
        evaluation: Evaluation | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_prompts,
            eval_dataset=evaluation.prompts if evaluation else None,
            processing_class=tokenizer,
            data_collator=list,
        )
        self.teacher = teacher
        self.evaluation = evaluation
        self.sampler = Sampler(args, model, tokenizer)
        self.loss_options = loss_options(args)
        self.skipped_steps = 0
        self._figures: dict[str, float] = {}
        self._warned = False
        teacher.model.to(args.device)

    def training_step(self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any) -> Tensor:
        """One optimiser step's gradient: roll the prompts out, then learn from the completions."""
        start = time.perf_counter()
        seed = (self.args.seed, self.state.global_step, self.args.process_index)
        completions = self.sampler.sample(self.model, [p.student_ids for p in inputs], seed)
        loss, sums = self.learn(model, inputs, completions)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.skipped_steps += 1  # a NaN would poison the optimiser's state
            model.zero_grad(set_to_none=True)
        self._note_step(sums, time.perf_counter() - start)
        return loss

    def learn(
        self, model: nn.Module, prompts: list[Prompt], completions: list[Completion]
    ) -> tuple[Tensor, Counter[str]]:
        """Accumulate the gradient of the mean loss over the completions of all ranks.

        Returns:
            This rank's share of the loss times the number of ranks, so that the mean over ranks is the
            global mean; and this rank's sums for the log.
        """
        model.train()
        sums = completion_sums(completions)
        unit = "tokens" if self.args.aggregation == "token" else "completions"
        own = torch.tensor(float(sums[unit]), device=self.args.device)
        denominator = self.accelerator.reduce(own, "sum")
        total = torch.zeros((), device=self.args.device)
        # Completions of similar length together, so that little is padded.
        order = sorted(range(len(completions)), key=lambda i: -len(completions[i].ids))
        for first in range(0, len(order), self.args.micro_batch_size):
            rows = order[first : first + self.args.micro_batch_size]
            is_last = first + self.args.micro_batch_size >= len(order)
            pairs = [prompts[i] for i in rows], [completions[i] for i in rows]
            synchronise = nullcontext() if is_last else self.accelerator.no_sync(model)
            with synchronise, self.compute_loss_context_manager():
                # DDP averages the gradient over the ranks.
                loss = self._loss(model, *pairs, denominator, sums) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            total += loss.detach()
        return total, sums

    def _loss(
        self,
        model: nn.Module,
        prompts: list[Prompt],
        completions: list[Completion],
        denominator: Tensor,
        sums: Counter[str],
    ) -> Tensor:
        """A micro-batch's share of the mean loss; adds its figures to the sums."""
        weights = None
        if self.args.aggregation == "sequence":
            lengths = torch.tensor([len(c.ids) for c in completions], device=self.args.device)
            weights = (1.0 / lengths).repeat_interleave(lengths)

        def loss_of(student: LazyLogits, teacher: LazyLogits) -> Tensor:
            output = distillation_loss(
                student,
                teacher,
                token_weights=weights,
                denominator=denominator,
                entropy=True,
                **self.loss_options,
            )
            sums.update(token_sums(output, teacher, self.args.k))
            return output.loss

        return side_by_side(
            model, self.teacher, prompts, completions, self.args.temperature, loss_of
        )

    def _note_step(self, sums: Counter[str], seconds: float) -> None:
        """Keep the step's figures over all ranks for the next log line; warn once of a drift."""
        names = sorted(sums)
        values = torch.tensor([float(sums[n]) for n in names], device=self.args.device)
        total = dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        self._figures = means(total) | {"tokens_per_second": total["tokens"] / seconds}
        if self.skipped_steps:
            self._figures["skipped_steps"] = float(self.skipped_steps)
        message = drift_warning(self.args, self._figures["student_mass"])
        if message and not self._warned and self.is_world_process_zero():
            print(f"warning: {message}", flush=True)
            self._warned = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, a training step's loss with its figures."""
        super().log(logs | self._figures if "loss" in logs else logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out measurements of the student as it is, see Evaluation."""
        if self.evaluation is None:
            raise ValueError("eval_data: missing; set it in the recipe to evaluate")
        metrics = self.evaluation.measure(self.model, self.state.global_step)
        self.log(metrics)
        return metrics

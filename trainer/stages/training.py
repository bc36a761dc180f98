"""What the stages share: a step completes its prompts and learns from the completions."""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler as Order

from opd_kernels.parallel import plain
from trainer.config import StageConfig
from trainer.data import Prompt
from trainer.errors import RunStoppedError, limits_memory
from trainer.measures.diagnostics import Sums, alarms
from trainer.measures.evaluation import Evaluation
from trainer.models.load import eval_mode, is_fsdp, reshard
from trainer.models.rollout import Completion
from trainer.models.teacher import on_students, token_ids
from trainer.run.checkpoint import DurableTrainer

REFERENCES, ROLLOUT = "held_out_completions.json", "rollout-{}.json"  # in a checkpoint


@dataclass(frozen=True)
class Part:
    """A term of a step's loss: the mean over its completions' tokens, times a coefficient.

    `loss` is of a micro-batch: (model, completions, token weights [N], denominator) -> the sum of
    weight * loss over its tokens, / denominator.
    """

    completions: list[Completion]
    loss: Callable[[nn.Module, list[Completion], Tensor, Tensor], Tensor]
    coefficient: float = 1.0


# Completions to learn from at a time, by a part's loss, with token weights [N] and denominator.
MicroBatch = tuple[Part, list[Completion], Tensor, Tensor]


class CompletionTrainer(DurableTrainer):
    """Learns from completions of a batch of prompts, sampled from the student unless overridden.

    The sampler is that of the evaluation, which may hold no prompts.
    """

    args: StageConfig
    needs_log_probs = False  # of the policy that sampled, in the completions

    def __init__(
        self, model: nn.Module, args: StageConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        collate, tokenizer = list, evaluation.sampler.tokenizer
        super().__init__(model, args, collate, data, evaluation.prompts, tokenizer)
        self.evaluation, self.sampler = evaluation, evaluation.sampler
        self.sums = Sums()  # of the steps since the last log line
        self.rollout: list[Completion] = []  # what the next steps learn from too
        self.skipped_in_a_row = 0
        self.repeated = _RepeatedBatches(self) if args.steps_per_rollout > 1 else None

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """The completions of a step's prompts."""
        # The ranks of a tensor-parallel group have the same prompts, and complete them alike.
        replica = self.args.process_index // self.get_tp_size()
        seed = (self.args.seed, self.state.global_step, replica)
        repeated = [p for p in prompts for _ in range(self.args.completions_per_prompt)]
        completions = self.sampler.sample(self.model, repeated, *seed)
        return self._with_log_probs(completions) if self.needs_log_probs else completions

    def parts(self, completions: list[Completion]) -> list[Part]:
        """The terms of the loss."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any) -> Tensor:
        """One optimiser step's gradient: complete the prompts, then learn from the completions."""
        start = time.perf_counter()
        if not self.rollout or self.state.global_step % self.args.steps_per_rollout == 0:
            with self.accelerator.autocast():
                self.rollout = self.complete(inputs)
        loss = self.learn(model, self.rollout)
        gradients = [plain(p.grad) for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).to(self.args.device)
        # A rank may have parts alone.
        is_finite = bool(torch.isfinite(self.accelerator.reduce(norm, "sum")))
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if not is_finite:
            if self.skipped_in_a_row > self.args.max_skipped_steps:
                raise RunStoppedError(
                    f"max_skipped_steps: {self.skipped_in_a_row} steps in a row had no finite "
                    "gradient; lower learning_rate or max_grad_norm and start from a checkpoint "
                    "before them"
                )
            self.sums.add(skipped_steps=float(self.is_world_process_zero()))
            loss = torch.zeros_like(loss)  # or every mean to come would be NaN
            # NaN would poison the optimiser's state; under float16 the scaler sees to it.
            if not self.accelerator.scaler:
                model.zero_grad(set_to_none=True)
        self.sums.add(seconds=time.perf_counter() - start)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Of the parameters as they are between steps."""
        reshard(self.model)
        return super().create_optimizer(model)

    def learn(self, model: nn.Module, completions: list[Completion]) -> Tensor:
        """Accumulate the gradient of the mean loss over all ranks' completions; return the loss."""
        model.train()
        self.sums.add_completions(completions)
        total = torch.zeros((), device=self.args.device)
        batches = [x for part in self.parts(completions) for x in self._batches(part)]
        if is_fsdp(model):
            batches += self._idle_batches(batches[-1], len(batches))
        for number, (part, batch, weights, denominator) in enumerate(batches, start=1):
            sync = nullcontext() if number == len(batches) else self._no_sync(model)
            with sync, limits_memory("micro_batch_size, micro_batch_tokens"):
                with self.accelerator.autocast():
                    loss = part.coefficient * part.loss(model, batch, weights, denominator)
                # DDP and FSDP average the gradient over the ranks that have prompts of their own.
                loss = loss * self.replicas
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    @property
    def replicas(self) -> int:
        """The groups of ranks that have prompts of their own; such a group is tensor-parallel."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """The gradient stays on the rank."""
        if is_fsdp(model) and self.is_distributed_loading_by_transformers:
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)

    def _idle_batches(self, last: MicroBatch, count: int) -> list[MicroBatch]:
        """What makes all ranks' micro-batches as many, at weight 0: FSDP gathers the weights for
        each of them from all ranks.
        """
        most = max(gather_object([count]))
        part, batch, weights, denominator = last
        return [(part, batch[:1], 0.0 * weights[: len(batch[0].ids)], denominator)] * (most - count)

    def _batches(self, part: Part) -> Iterator[MicroBatch]:
        """Micro-batches of completions of one teacher and similar length, so little is padded; one
        that is alone may have more than micro_batch_tokens.

        A rank without any takes part all the same, with one of the others at weight 0: the other
        ranks wait for its gradient.
        """
        kept = [c for c in part.completions if not (self.args.skip_truncated and c.truncated)]
        per_token = self.args.aggregation == "token"
        own = float(sum(len(c.ids) for c in kept) if per_token else len(kept))
        everyone = self.accelerator.reduce(torch.tensor(own, device=self.args.device), "sum")
        denominator = everyone / self.get_tp_size()
        order = sorted(
            kept or part.completions[:1], key=lambda c: (c.prompt.teacher, -c.context_length)
        )
        most = self.args.micro_batch_tokens or sys.maxsize
        first = 0
        while first < len(order):
            size = max(1, min(self.args.micro_batch_size, most // order[first].context_length))
            batch = order[first : first + size]
            batch = [c for c in batch if c.prompt.teacher == batch[0].prompt.teacher]
            first += len(batch)
            lengths = torch.tensor([len(c.ids) for c in batch], device=self.args.device)
            weights = torch.ones_like(lengths, dtype=torch.float32) if per_token else 1.0 / lengths
            weights = weights.repeat_interleave(lengths) * bool(kept)
            yield part, batch, weights, denominator.clamp_min(1.0)

    @torch.no_grad()
    def _with_log_probs(self, completions: list[Completion]) -> list[Completion]:
        result, size = [], self.args.micro_batch_size
        with eval_mode(self.model):
            for batch in (completions[i : i + size] for i in range(0, len(completions), size)):
                of = methodcaller("log_prob", token_ids(batch, self.args.device))
                flat = on_students(self.model, batch, self.args.temperature, of)
                rows = flat.split([len(c.ids) for c in batch])
                result += [
                    replace(c, log_probs=x.tolist()) for c, x in zip(batch, rows, strict=True)
                ]
        return result

    def _get_train_sampler(self, *arguments: Any) -> Order | None:
        return self.repeated or super()._get_train_sampler(*arguments)

    def save_more(self, checkpoint: Path) -> None:
        """Keep the held-out completions of the teacher that began, and each rank's completions that
        steps to come learn from, without their rows.
        """
        if self.args.should_save:
            self.evaluation.save_references(checkpoint / REFERENCES)
        if self.args.steps_per_rollout > 1:
            kept = [asdict(replace(c, prompt=replace(c.prompt, row={}))) for c in self.rollout]
            path = checkpoint / ROLLOUT.format(self.args.process_index)
            path.write_text(json.dumps(kept))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *models: nn.Module | None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *models)
        checkpoint = Path(resume_from_checkpoint)
        self.evaluation.load_references(checkpoint / REFERENCES)
        path = checkpoint / ROLLOUT.format(self.args.process_index)
        if path.exists():
            saved = json.loads(path.read_text())
            self.rollout = [Completion(**x | {"prompt": Prompt(**x["prompt"])}) for x in saved]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log; a training loss comes with the figures of its steps over all ranks."""
        if "loss" in logs:
            total = Sums()
            for own in gather_object([dict(self.sums)]):
                total.add(**own)
            self.sums.clear()
            logs |= total.means() | {"skipped_steps": total["skipped_steps"]}
            # Seconds are of all ranks, tokens of all in a tensor-parallel group.
            logs["tokens_per_second"] = total["tokens"] * self.replicas / total["seconds"]
            if self.is_world_process_zero():
                alarm = alarms(self.args, [*self.state.log_history, logs])
                if alarm:
                    warnings.warn(alarm, stacklevel=2)
                    logs |= {"alarm": alarm}
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


class _RepeatedBatches(Order[int]):
    """Full batches of a random order of the data, each several times in a row."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        args = trainer.args
        self.count = len(trainer.train_dataset)
        self.size = args.train_batch_size * trainer.replicas
        self.times, self.seed, self.trainer = args.steps_per_rollout, args.seed, trainer
        if self.count < self.size:
            raise ValueError(
                f"per_device_train_batch_size: expected at most the {self.count} prompts over all "
                f"ranks with steps_per_rollout above 1, got {self.size}"
            )

    def __len__(self) -> int:
        return self.count // self.size * self.size * self.times

    def __iter__(self) -> Iterator[int]:
        # The run's own epoch: nobody tells it to a sampler of a rank that resumes.
        generator = torch.Generator().manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        order = torch.randperm(self.count, generator=generator).tolist()
        for first in range(0, self.count - self.size + 1, self.size):
            yield from order[first : first + self.size] * self.times

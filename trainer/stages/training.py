"""The training step of all stages: complete a batch of prompts, then learn from the completions."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler as IndexSampler

from opd_kernels.parallel import plain
from opd_trainer.config import StageConfig
from opd_trainer.data import Prompt
from opd_trainer.errors import RunStoppedError, name_memory_keys
from opd_trainer.measures.diagnostics import Sums, alarms
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import eval_mode, is_fsdp, reshard
from opd_trainer.models.rollout import Completion
from opd_trainer.models.teacher import log_probs, token_ids
from opd_trainer.run.checkpoint import DurableTrainer

REFERENCES, ROLLOUT = "held_out_completions.json", "rollout-{}.json"  # in a checkpoint


@dataclass(frozen=True)
class MicroBatch:
    """Completions for one forward and backward pass, all of the same teacher."""

    completions: list[Completion]
    weights: Tensor  # [N] of the tokens; 0 on a rank that has nothing to learn from
    denominator: Tensor  # the loss is the weighted sum over all ranks' tokens, divided by this

    @cached_property
    def ids(self) -> Tensor:
        """The tokens [N]."""
        return token_ids(self.completions, self.weights.device)

    def sampled_log_probs(self) -> Tensor:
        """Return the log-probs [N] of the tokens by the policy that sampled them."""
        flat = [x for c in self.completions for x in c.log_probs or []]
        return torch.tensor(flat, device=self.weights.device)


@dataclass(frozen=True)
class Part:
    """A term of a step's loss: a mean over its completions' tokens, times a coefficient."""

    completions: list[Completion]
    loss: Callable[[nn.Module, MicroBatch], Tensor]  # the micro-batch's share of the mean
    coefficient: float = 1.0


class CompletionTrainer(DurableTrainer):
    """Learns from completions of prompts, which are sampled from the student by default."""

    args: StageConfig

    def __init__(
        self, model: nn.Module, args: StageConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        self.evaluation, self.sampler = evaluation, evaluation.sampler
        super().__init__(model, args, list, data, evaluation.prompts, self.sampler.tokenizer)
        self.sums = Sums()  # of the steps since the last log line
        self.rollout: list[Completion] = []
        self.skipped_in_a_row = 0
        self.repeated = _RepeatedBatches(self) if args.steps_per_rollout > 1 else None

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """Return the completions of a step's prompts."""
        # All ranks of a tensor-parallel group have the same prompts and must sample alike.
        replica = self.args.process_index // self.get_tp_size()
        seed = (self.args.seed, self.state.global_step, replica)
        repeated = [p for p in prompts for _ in range(self.args.completions_per_prompt)]
        return self.sampler.sample(self.model, repeated, *seed)

    def parts(self, completions: list[Completion]) -> list[Part]:
        """Return the terms of the loss."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any) -> Tensor:
        """Compute the gradient of one optimiser step; skip the step if it is not finite."""
        start = time.perf_counter()
        if not self.rollout or self.state.global_step % self.args.steps_per_rollout == 0:
            with self.accelerator.autocast():
                self.rollout = self.complete(inputs)
            if not self.console.has_shown_sample:
                self.print_sample(self.rollout[0])
        loss = self.learn(model, self.rollout)
        gradients = [plain(p.grad) for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).to(self.args.device)
        # A rank may hold only some of the parameters.
        is_finite = bool(torch.isfinite(self.accelerator.reduce(norm, "sum")))
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if not is_finite:
            if self.skipped_in_a_row > self.args.max_skipped_steps:
                raise RunStoppedError(
                    f"max_skipped_steps: {self.skipped_in_a_row} steps in a row had no finite "
                    "gradient; lower learning_rate or max_grad_norm and use an earlier checkpoint"
                )
            self.sums.add(skipped_steps=float(self.is_world_process_zero()))
            loss = torch.zeros_like(loss)  # NaN would make every later mean NaN
            # NaN would also poison the optimiser's state; under float16 the scaler prevents that.
            if not self.accelerator.scaler:
                model.zero_grad(set_to_none=True)
        self.sums.add(seconds=time.perf_counter() - start)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser of the parameters as FSDP holds them between steps."""
        reshard(self.model)
        return super().create_optimizer(model)

    def learn(self, model: nn.Module, completions: list[Completion]) -> Tensor:
        """Accumulate the gradient of the mean loss over all ranks' completions; return the loss."""
        model.train()
        self.sums.add_completions(completions)
        total = torch.zeros((), device=self.args.device)
        parts = self.parts(completions)
        batches = [(part, batch) for part in parts for batch in self._micro_batches(part)]
        if is_fsdp(model):
            # FSDP gathers the weights from all ranks in each pass, so all need as many batches.
            missing = max(gather_object([len(batches)])) - len(batches)
            last = batches[-1][1]
            batches += [(parts[-1], replace(last, weights=0.0 * last.weights))] * missing
        for number, (part, batch) in enumerate(batches, start=1):
            sync = nullcontext() if number == len(batches) else self._no_sync(model)
            with sync, name_memory_keys("micro_batch_size, micro_batch_tokens"):
                with self.accelerator.autocast():
                    loss = part.coefficient * part.loss(model, batch)
                # DDP and FSDP average the gradient over the replicas, but the loss is a sum.
                loss = loss * self.replicas
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    @property
    def replicas(self) -> int:
        """The number of tensor-parallel groups; each group has prompts of its own."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a backward pass does not reduce the gradient over ranks."""
        if is_fsdp(model) and self.is_distributed_loading_by_transformers:
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)

    def _micro_batches(self, part: Part) -> Iterator[MicroBatch]:
        """Yield micro-batches of one teacher's completions, of similar length to save padding.

        A single completion may exceed micro_batch_tokens. A rank without completions yields one
        of weight 0, because the other ranks wait for its gradient.
        """
        kept = [c for c in part.completions if not (self.args.skip_truncated and c.truncated)]
        per_token = self.args.aggregation == "token"
        count = float(sum(len(c.ids) for c in kept) if per_token else len(kept))
        total = self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum")
        denominator = (total / self.get_tp_size()).clamp_min(1.0)
        used = kept or part.completions[:1]
        ordered = sorted(used, key=lambda c: (c.prompt.teacher, -c.context_length))
        max_tokens = self.args.micro_batch_tokens or sys.maxsize
        while ordered:
            longest = ordered[0]
            size = max(1, min(self.args.micro_batch_size, max_tokens // longest.context_length))
            batch = [c for c in ordered[:size] if c.prompt.teacher == longest.prompt.teacher]
            ordered = ordered[len(batch) :]
            weights = [1.0 if per_token else 1.0 / len(c.ids) for c in batch for _ in c.ids]
            tensor = torch.tensor(weights, device=self.args.device)
            yield MicroBatch(batch, tensor * bool(kept), denominator)

    @torch.no_grad()
    def with_log_probs(self, completions: list[Completion]) -> list[Completion]:
        """Return the completions with the log-probs of the current student."""
        result, size = [], self.args.micro_batch_size
        with eval_mode(self.model):
            for batch in (completions[i : i + size] for i in range(0, len(completions), size)):
                flat = log_probs(self.model, batch, self.args.temperature)
                rows = zip(batch, flat.split([len(c.ids) for c in batch]), strict=True)
                result += [replace(c, log_probs=row.tolist()) for c, row in rows]
        return result

    def _get_train_sampler(self, *arguments: Any) -> IndexSampler | None:
        return self.repeated or super()._get_train_sampler(*arguments)

    def save_more(self, checkpoint: Path) -> None:
        """Save the held-out references, and each rank's rollout if later steps reuse it."""
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
        """Log; add the metrics of all ranks' steps to a training loss."""
        if "loss" in logs:
            total = Sums()
            for sums in gather_object([dict(self.sums)]):
                total.add(**sums)
            self.sums.clear()
            logs |= total.means() | {"skipped_steps": total["skipped_steps"]}
            # The seconds of all ranks are added up, but each token counts once per rank of a
            # tensor-parallel group.
            logs["tokens_per_second"] = total["tokens"] * self.replicas / total["seconds"]
            history = [*self.state.log_history, logs]
            if self.is_world_process_zero() and (alarm := alarms(self.args, history)):
                logs |= {"alarm": alarm}
        super().log(logs, start_time)

    def print_sample(self, completion: Completion) -> None:
        """Print a completion with its prompt, both with their special tokens."""
        decode = self.sampler.tokenizer.decode
        texts = decode(completion.prompt.student_ids), decode(completion.ids)
        self.console.print_sample(f"sample at step {self.state.global_step}:", *texts)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return held-out metrics of the student, see Evaluation; {} without eval_data."""
        if not self.evaluation.prompts:
            return {}
        with self.accelerator.autocast():
            metrics = self.evaluation.measure(self.model, self.state.global_step)
        self.log(metrics)
        if self.evaluation.sample:
            self.print_sample(self.evaluation.sample)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _RepeatedBatches(IndexSampler[int]):
    """Yields the data's indices in random order, each full batch several times in a row."""

    def __init__(self, trainer: CompletionTrainer) -> None:
        args = trainer.args
        self.count = len(trainer.train_dataset)
        self.size = args.train_batch_size * trainer.replicas
        self.times, self.seed, self.trainer = args.steps_per_rollout, args.seed, trainer
        if self.count < self.size:
            expected = f"expected at most the {self.count} prompts with steps_per_rollout above 1"
            raise ValueError(f"per_device_train_batch_size: {expected}, got {self.size}")

    def __len__(self) -> int:
        return self.count // self.size * self.size * self.times

    def __iter__(self) -> Iterator[int]:
        # Trainer does not call set_epoch on a rank that resumes, so the epoch comes from its state.
        generator = torch.Generator().manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count - self.size + 1, self.size):
            yield from order[start : start + self.size] * self.times

"""The training step of all stages: complete a batch of prompts, then learn from the completions."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler as IndexSampler

from opd_kernels import LazyLogits
from opd_kernels.parallel import plain
from opd_trainer.config import StageConfig
from opd_trainer.data import Prompt
from opd_trainer.errors import RunStoppedError, name_memory_keys
from opd_trainer.measures.diagnostics import Sums, alarms
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import is_fsdp, reshard
from opd_trainer.models.rollout import Completion
from opd_trainer.models.teacher import on_completions, token_ids
from opd_trainer.run.checkpoint import DurableTrainer
from opd_trainer.stages.order import Order

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

    def loss(
        self, model: nn.Module, temperature: float, function: Callable[[LazyLogits], Tensor]
    ) -> Tensor:
        """Return function(logits) of the tokens, plus the batch's share of the loss of a router."""
        share = self.weights.sum() / self.denominator
        return on_completions(model, self.completions, temperature, function, router_weight=share)

    def sampled_log_probs(self, now: Tensor) -> Tensor:
        """Return the log-probs [N] of the tokens by the engine that sampled them.

        Args:
            now: [N] the student's, which stand in for those of an engine that returns none.
        """
        if any(c.log_probs is None for c in self.completions):
            return now.detach()
        return now.new_tensor([x for c in self.completions for x in c.log_probs or []])


@dataclass(frozen=True)
class Part:
    """A term of a step's loss: a mean over its completions' tokens, times a coefficient."""

    completions: list[Completion]
    loss: Callable[[nn.Module, MicroBatch], Tensor]  # the micro-batch's share of the mean
    coefficient: float = 1.0


class CompletionTrainer(DurableTrainer):
    """Learns from completions of prompts, which are sampled from the student by default."""

    args: StageConfig
    loss_is_scaled_for_ga = True  # Trainer must not divide a micro-batch's share of the mean

    def __init__(
        self, model: nn.Module, args: StageConfig, data: list[Prompt], evaluation: Evaluation
    ) -> None:
        self.evaluation, self.sampler = evaluation, evaluation.sampler
        super().__init__(model, args, list, data, evaluation.prompts, self.sampler.tokenizer)
        self.sums = Sums()  # of the steps since the last log line
        self.inputs: dict[str, Tensor] = {}  # of the last step's forward passes, to count tokens
        self.rollout: list[Completion] = []
        self.skipped_in_a_row = 0
        size, drops = self.get_total_train_batch_size(args), args.dataloader_drop_last
        if len(data) < size and (drops or args.steps_per_rollout > 1):
            why = "dataloader_drop_last" if drops else "steps_per_rollout above 1"
            problem = f"expected at most the {len(data)} prompts with {why}, got {size}"
            raise ValueError(f"per_device_train_batch_size: {problem}; there would be no step")
        is_grouped = args.train_sampling_strategy == "group_by_length"
        self.order = Order(self, data) if is_grouped or args.steps_per_rollout > 1 else None

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
            self._set_optimizer_mode("train")  # on-policy: from the weights of the gradient
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
        if not any(p.requires_grad for p in self.model.parameters()):
            raise RunStoppedError("model: expected parameters that need a gradient, got none")
        reshard(self.model)
        return super().create_optimizer(model)

    def learn(self, model: nn.Module, completions: list[Completion]) -> Tensor:
        """Accumulate the gradient of the mean loss over all ranks' completions; return the loss."""
        self.sums.add_completions(completions)
        total = torch.zeros((), device=self.args.device)
        parts = self.parts(completions)
        batches = [(part, batch) for part in parts for batch in self._micro_batches(part)]
        if is_fsdp(model):
            # FSDP gathers the weights from all ranks in each pass, so all need as many batches.
            missing = max(gather_object([len(batches)])) - len(batches)
            last = batches[-1][1]
            batches += [(parts[-1], replace(last, weights=0.0 * last.weights))] * missing
        self.inputs = self._token_masks([batch for _, batch in batches])
        for number, batch in enumerate(batches, start=1):
            sync = nullcontext() if number == len(batches) else self._no_sync(model)
            with sync, name_memory_keys("micro_batch_size, micro_batch_tokens"):
                total += super().training_step(model, batch)
        return total

    def compute_loss(
        self, model: nn.Module, inputs: tuple[Part, MicroBatch], *_: Any, **__: Any
    ) -> Tensor:
        """Return the loss of a micro-batch, which Trainer.training_step differentiates."""
        part, batch = inputs
        with self.accelerator.autocast():
            loss = part.coefficient * part.loss(model, batch)
        # DDP and FSDP average the gradient over the replicas, but the loss is a sum.
        return loss * self.replicas

    def _token_masks(self, batches: list[MicroBatch]) -> dict[str, Tensor]:
        """Return 1 for tokens and 0 for padding of all micro-batches, as a model's inputs."""
        lengths = [[len(c.prompt.student_ids) + len(c.ids) for c in b.completions] for b in batches]
        rows = [torch.arange(max(row)) < torch.tensor(row)[:, None] for row in lengths]
        mask = torch.cat([row.flatten() for row in rows])
        return {"input_ids": mask, "attention_mask": mask}

    def _track_num_input_tokens(self, inputs: list[Prompt]) -> None:
        """Count the tokens of the step's forward passes: the inputs are prompts only."""
        super()._track_num_input_tokens(self.inputs)

    def floating_point_ops(self, inputs: list[Prompt]) -> int:
        """Return the operations of the step's forward and backward passes."""
        return super().floating_point_ops(self.inputs)

    def _set_optimizer_mode(self, mode: Literal["train", "eval"]) -> None:
        """Give the model a schedule-free optimiser's weights for gradients, or their average."""
        getattr(self.optimizer, mode, lambda: None)()

    def save_model(self, *arguments: Any, **options: Any) -> None:
        """Save the student, with the average of a schedule-free optimiser."""
        self._set_optimizer_mode("eval")
        super().save_model(*arguments, **options)

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

    def compare_engine(self, batch: MicroBatch, now: Tensor) -> None:
        """Add the distance of the engine's log-probs from the student's [N] to the metrics.

        Later steps on the same completions and other sampling options part them on purpose.
        """
        is_fresh = self.state.global_step % self.args.steps_per_rollout == 0
        is_known = batch.weights.any() and all(c.log_probs for c in batch.completions)
        if is_fresh and is_known and not self.args.samples_differ:
            self.sums.add_engine((now.detach() - batch.sampled_log_probs(now)).abs())

    def _get_train_sampler(self, *arguments: Any) -> IndexSampler | None:
        return self.order or super()._get_train_sampler(*arguments)

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
            ends = self.state.global_step >= self.state.max_steps
            if self.is_world_process_zero() and (alarm := alarms(self.args, history, ends)):
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
        self._set_optimizer_mode("eval")
        with self.accelerator.autocast():
            metrics = self.evaluation.measure(self.model, self.state.global_step)
        self.log(metrics)
        if self.evaluation.sample:
            self.print_sample(self.evaluation.sample)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

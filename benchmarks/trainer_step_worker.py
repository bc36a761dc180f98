"""A trainer in its own process that takes one training step per command.

The trainer runs its usual loop. The measured step includes data, rollout, loss, backward, clipping,
optimiser and logging.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from benchmarks.worker import Worker, reset_peak, status
from opd_trainer.config import DistillationConfig
from opd_trainer.data import Prompt
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import Model, Tokenizer, load_model, load_tokenizer
from opd_trainer.models.rollout import Completion, Sampler
from opd_trainer.models.teacher import LocalTeacher
from opd_trainer.stages.distillation import OnPolicyDistillationTrainer


@dataclass(frozen=True)
class Step:
    """One optimiser step on a batch of prompts."""

    model: str
    prompts: list[str]
    completions: list[list[int]]  # one per prompt; if empty, each is sampled, `tokens` long
    tokens: int  # of the longest completion
    micro_batch_size: int

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return the token ids of the prompts, as both trainers encode them."""
        chats = [conversation(prompt) for prompt in self.prompts]
        options = {"add_generation_prompt": True, "return_dict": False}
        return [tokenizer.apply_chat_template(chat, **options) for chat in chats]


def conversation(prompt: str) -> list[dict[str, str]]:
    """Return a prompt as a chat."""
    return [{"role": "user", "content": prompt}]


class StepWorker(Worker):
    """The parent's side of a trainer's process.

    `seconds` returns the time of the rollout and of the rest of the step. The peak memory does not
    count models and optimiser state; it is that of gradients, activations and logits.
    """

    MODULE = "benchmarks.trainer_step_worker"

    def __init__(self, provider: str, step: Step, folder: Path) -> None:
        super().__init__(provider, step, folder)
        self._gradient = folder / "gradient.pt"

    def warm_up(self) -> None:
        """Take the first step and keep its loss and gradients."""
        self._loss = self._ask("gradient")["loss"]

    def first_step(self) -> tuple[float, dict[str, Tensor]]:
        """Return the first step's loss, and its gradients by parameter name."""
        return self._loss, torch.load(self._gradient, mmap=True, weights_only=True)


class OnCommand(TrainerCallback):
    """Makes a trainer take one step per command, and answers when the next step would begin."""

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self.commands, self.answers = commands, answers
        self.command = ""
        self.start = self.rollout = self.loss = 0.0
        self.resident = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.command:
            print(json.dumps(self._answer()), file=self.answers, flush=True)
        self.command = self.commands.readline().strip()
        if not self.command:
            sys.exit()  # the parent has closed the pipe
        if self.command == "memory":
            self.resident = reset_peak()
        self.start, self.rollout = time.perf_counter(), 0.0

    def on_pre_optimizer_step(self, args: Any, *_: Any, model: Model, **__: Any) -> None:
        if self.command == "gradient":
            named = model.named_parameters()
            gradient = {n: p.grad for n, p in named if p.grad is not None}
            torch.save(gradient, f"{args.output_dir}/gradient.pt")

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def _answer(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start
        return {
            "loss": self.loss,
            "bytes": max(0, status("VmHWM") - self.resident),
            "forward": self.rollout,
            "backward": seconds - self.rollout,
        }

    def time_rollout(self, owner: Any, method: str, replacement: Callable[..., Any] | None) -> None:
        """Count the time of a method, or of its replacement, as rollout."""
        call = replacement or getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **options)
            self.rollout += time.perf_counter() - start
            return result

        setattr(owner, method, timed)


Models = tuple[Model, Model, Tokenizer]


def ours(step: Step, models: Models, on_command: OnCommand, folder: str, **options: Any) -> Trainer:
    """Return this project's trainer; options are keys of its config."""
    student, teacher, tokenizer = models
    config = DistillationConfig(
        model=step.model, teacher=step.model, train_data="", eval_on_start=False,
        per_device_train_batch_size=len(step.prompts), micro_batch_size=step.micro_batch_size,
        **_common(step, folder), **options,
    )  # fmt: skip
    ids = step.encode(tokenizer)
    prompts = [Prompt(text, x, x) for text, x in zip(step.prompts, ids, strict=True)]
    sampler = Sampler(config, tokenizer, student, teacher)
    sampler.options.min_new_tokens = step.tokens
    given = dict(zip(step.prompts, step.completions, strict=False))

    def hand_out(_: Model, batch: list[Prompt], *__: int) -> list[Completion]:
        return [Completion(prompt, given[prompt.text], truncated=True) for prompt in batch]

    on_command.time_rollout(sampler, "sample", hand_out if given else None)
    evaluation = Evaluation(config, [], {"": LocalTeacher(teacher)}, sampler)
    return OnPolicyDistillationTrainer(student, config, prompts, evaluation)


def trl(step: Step, models: Models, on_command: OnCommand, folder: str) -> Trainer:
    """Return TRL's trainer with the exact reverse KL, that is beta = 1."""
    from datasets import Dataset
    from trl import DistillationConfig as Config
    from trl import DistillationTrainer

    student, teacher, tokenizer = models
    config = Config(
        beta=1.0, bf16=False, gradient_checkpointing=False, shuffle_dataset=False,
        per_device_train_batch_size=step.micro_batch_size,
        gradient_accumulation_steps=len(step.prompts) // step.micro_batch_size,
        generation_kwargs={"min_new_tokens": step.tokens}, **_common(step, folder),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": conversation(prompt)} for prompt in step.prompts])
    trainer = DistillationTrainer(
        student, teacher, config, train_dataset=data, processing_class=tokenizer
    )
    ids = map(tuple, step.encode(tokenizer))
    given = dict(zip(ids, step.completions, strict=False))

    def hand_out(prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        return [given[tuple(prompt)] for prompt in prompt_ids]

    on_command.time_rollout(trainer, "_generate_single_turn", hand_out if given else None)
    return trainer


PROVIDERS: dict[str, Callable[..., Trainer]] = {
    "trl": trl,
    "ours_full": partial(ours, support="full"),
    "ours_topk": partial(ours, k=20, tail="bucket"),
}


def _common(step: Step, folder: str) -> dict[str, Any]:
    """Return the options that both trainers share."""
    return {
        "output_dir": folder,
        "temperature": 1.0,
        "max_completion_length": step.tokens,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # the norm is computed, but never clips, so gradients stay comparable
        "max_steps": 1_000_000,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def load_models(step: Step) -> Models:
    """Return a student, a teacher with noise added to the same weights, and their tokenizer."""
    student, teacher = (load_model(step.model, "float32") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in _matrices(teacher.requires_grad_(False)):
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise, alpha=0.1 * float(weight.std()))
    return student, teacher, load_tokenizer(step.model)


def _matrices(model: Model) -> Iterator[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.dim() > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("step", type=json.loads)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    step = Step(**arguments.step)
    on_command = OnCommand(sys.stdin, sys.stdout)
    with redirect_stdout(sys.stderr):  # stdout is the pipe, and trainers print their logs
        build = PROVIDERS[arguments.provider]
        trainer = build(step, load_models(step), on_command, arguments.folder)
        trainer.add_callback(on_command)
        trainer.train()


if __name__ == "__main__":
    main()

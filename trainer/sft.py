"""Supervised fine-tuning on completions that are given, or that a teacher generates first."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from opd_kernels import LazyLogits
from trainer.config import SFTConfig
from trainer.data import Prompt
from trainer.rollout import Completion, Sampler
from trainer.teacher import LocalTeacher, Teacher, on_students, token_ids
from trainer.training import CompletionTrainer, Part

GENERATED = "completions.jsonl"


class SFTTrainer(CompletionTrainer):
    """Maximises the likelihood of the prompts' reference completions."""

    args: SFTConfig

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """The prompts' own completions."""
        ends = self.sampler.eos_ids
        given = [(p, p.reference_ids or []) for p in prompts]
        return [Completion(p, ids, truncated=ids[-1] not in ends) for p, ids in given]

    def parts(self, completions: list[Completion]) -> list[Part]:
        """The cross-entropy."""
        return [Part(completions, negative_log_likelihood(self.args.temperature))]


def negative_log_likelihood(
    temperature: float,
) -> Callable[[nn.Module, list[Completion], Tensor, Tensor], Tensor]:
    """The cross-entropy of the completions' tokens in nats, as the loss of a Part."""

    def loss(
        model: nn.Module, batch: list[Completion], weights: Tensor, denominator: Tensor
    ) -> Tensor:
        def of(logits: LazyLogits) -> Tensor:
            return -(logits.log_prob(token_ids(batch, weights.device)) * weights).sum()

        return on_students(model, batch, temperature, of) / denominator

    return loss


def generate(
    config: SFTConfig, prompts: list[Prompt], teachers: dict[str, Teacher], sampler: Sampler
) -> list[Prompt]:
    """Prompts with completions of their teachers, kept in completions.jsonl for a resumed run."""
    path = Path(config.output_dir) / GENERATED
    repeated = [p for p in prompts for _ in range(config.completions_per_prompt)]
    if config.resume_from_checkpoint and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["ids"] for line in lines]
        return [replace(p, reference_ids=ids) for p, ids in zip(repeated, rows, strict=True)]
    result: list[Completion] = []
    for number, (name, teacher) in enumerate(teachers.items()):
        assert isinstance(teacher, LocalTeacher)
        own = [p for p in repeated if p.teacher == name]
        with teacher.active() as model:
            result += sampler.sample(model, own, config.seed, number, as_teacher=True)
    if config.should_save:
        rows = [{"prompt": c.prompt.text, "completion": sampler.text(c), "ids": c.ids}
                for c in result]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [replace(c.prompt, reference_ids=c.ids) for c in result]

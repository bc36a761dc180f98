"""Supervised fine-tuning on completions that are given, or that a teacher generates first."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from opd_kernels import LazyLogits
from trainer.config import SFTConfig
from trainer.data import Prompt
from trainer.measures.evaluation import Evaluation
from trainer.models.rollout import Completion
from trainer.models.teacher import on_students, token_ids
from trainer.run.directory import write_whole
from trainer.stages.training import CompletionTrainer, Part

GENERATED = "completions.jsonl"
_TRAINING = (1 << 31) + 1  # a seed of neither steps nor held-out completions


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
        return [Part(completions, partial(negative_log_likelihood, self.args.temperature))]


def negative_log_likelihood(
    temperature: float,
    model: nn.Module,
    batch: list[Completion],
    weights: Tensor,
    denominator: Tensor,
) -> Tensor:
    """The cross-entropy of the completions' tokens in nats, as the loss of a Part."""

    def loss(logits: LazyLogits) -> Tensor:
        return -(logits.log_prob(token_ids(batch, weights.device)) * weights).sum()

    return on_students(model, batch, temperature, loss) / denominator


def generate(config: SFTConfig, prompts: list[Prompt], evaluation: Evaluation) -> list[Prompt]:
    """Prompts with completions of their teachers, kept in completions.jsonl for a resumed run."""
    path = Path(config.output_dir) / GENERATED
    repeated = [p for p in prompts for _ in range(config.completions_per_prompt)]
    if config.resume_from_checkpoint and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [json.loads(line) for line in lines]
        if [row["prompt"] for row in kept] != [p.text for p in repeated]:
            raise ValueError(
                f"train_data: expected the prompts of {path}, which the run began with"
            )
        return [replace(p, reference_ids=x["ids"]) for p, x in zip(repeated, kept, strict=True)]
    result = evaluation.continued(repeated, _TRAINING)
    if config.should_save:
        text = evaluation.sampler.text
        rows = [{"prompt": c.prompt.text, "completion": text(c), "ids": c.ids} for c in result]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return [replace(c.prompt, reference_ids=c.ids) for c in result]

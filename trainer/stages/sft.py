"""Supervised fine-tuning on completions of the data, or of a teacher that generates them first."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from opd_kernels import LazyLogits
from opd_trainer.config import SFTConfig
from opd_trainer.data import Prompt, read_json_lines
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.rollout import Completion
from opd_trainer.run.directory import COMPLETIONS, write_whole
from opd_trainer.stages.training import CompletionTrainer, MicroBatch, Part

_TRAINING = (1 << 31) + 1  # a seed that neither steps nor held-out completions use


class SFTTrainer(CompletionTrainer):
    """Maximises the likelihood of the prompts' reference completions."""

    args: SFTConfig

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """Return the reference completions."""
        ends = self.sampler.eos_ids
        given = [(p, p.reference_ids or []) for p in prompts]
        return [Completion(p, ids, truncated=ids[-1] not in ends) for p, ids in given]

    def parts(self, completions: list[Completion]) -> list[Part]:
        """Return the cross-entropy."""
        return [Part(completions, partial(negative_log_likelihood, self.args.temperature))]


def negative_log_likelihood(temperature: float, model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the cross-entropy of the completions' tokens in nats, as the loss of a Part."""

    def loss_of(logits: LazyLogits) -> Tensor:
        return -(logits.log_prob(batch.ids) * batch.weights).sum() / batch.denominator

    return batch.loss(model, temperature, loss_of)


def generate(config: SFTConfig, prompts: list[Prompt], evaluation: Evaluation) -> list[Prompt]:
    """Return the prompts with completions of their teachers; a resumed run reads them again."""
    path = Path(config.output_dir) / COMPLETIONS
    repeated = [p for p in prompts for _ in range(config.completions_per_prompt)]
    if config.resume_from_checkpoint and path.exists():
        kept = read_json_lines(path)
        if [row["prompt"] for row in kept] != [p.text for p in repeated]:
            raise ValueError(
                f"train_data: expected the prompts of {path}, which the run began with"
            )
        return [replace(p, reference_ids=x["ids"]) for p, x in zip(repeated, kept, strict=True)]
    completions = evaluation.complete_by_teachers(repeated, _TRAINING)
    if config.should_save:
        text = evaluation.sampler.text
        rows = [{"prompt": c.prompt.text, "completion": text(c), "ids": c.ids} for c in completions]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return [replace(c.prompt, reference_ids=c.ids) for c in completions]

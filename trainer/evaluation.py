"""Held-out measurements: how far the student is from its teacher, and whether it does as it does.

The headline is the reverse KL on fixed completions of the teacher; on the student's own samples it
may rise while the student learns.
"""

import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_kernels import LazyLogits, distillation_loss
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.diagnostics import completion_sums, means, token_sums
from trainer.rollout import Completion, Sampler
from trainer.teacher import Teacher, side_by_side

SAMPLES = "samples.jsonl"
_HELD_OUT = 1 << 31  # a seed that no training step has


@dataclass
class Evaluation:
    """Measures students on held-out prompts, on the same completions and with the same seeds."""

    config: DistillationConfig
    prompts: list[Prompt]
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    references: list[Completion] = field(default_factory=list)  # the teacher's, sampled once

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.config, self.teacher.model, self.tokenizer)
        self.scorer = load_scorer(self.config.scorer) if self.config.scorer else None

    def measure(self, student: PreTrainedModel, step: int) -> dict[str, float]:
        """Figures of the student as it is; appends its samples to samples.jsonl."""
        if not self.prompts:
            return {}
        if not self.references:
            with self.teacher.active() as model:
                self.references = self._sample(model, as_teacher=True)
        own = self._sample(student)
        texts = self._write_samples(own, step)
        fixed = self._divergence(student, self.references)
        on_policy = self._divergence(student, own)
        metrics = {"eval_reverse_kl": fixed["kl"], "eval_overlap": fixed["overlap"]}
        metrics["eval_reverse_kl_per_completion"] = fixed["kl"] * fixed["completion_length"]
        metrics["eval_reverse_kl_on_own_samples"] = on_policy["kl"]
        metrics["eval_completion_length"] = on_policy["completion_length"]
        if self.scorer:
            metrics["eval_score"] = sum(map(self.scorer, texts)) / len(texts)
        return metrics

    def _sample(self, model: PreTrainedModel, as_teacher: bool = False) -> list[Completion]:
        completions: list[Completion] = []
        for batch in self._batches(self.prompts, "completions"):
            seed = (self.config.seed, _HELD_OUT, len(completions))
            completions += self.sampler.sample(model, batch, *seed, as_teacher=as_teacher)
        return completions

    @torch.no_grad()
    def _divergence(
        self, student: PreTrainedModel, completions: list[Completion]
    ) -> dict[str, float]:
        """Per token of the completions: the exact reverse KL `kl`, and token_sums' figures."""

        def add(ours: LazyLogits, theirs: LazyLogits) -> None:
            k = self.config.k
            output = distillation_loss(ours, theirs, k=k, support="full", reduction="sum")
            sums.update(token_sums(output, theirs, k) | {"kl": float(output.loss)})

        sums, was_training = completion_sums(completions), student.training
        student.eval()
        for batch in self._batches(completions, "divergence"):
            side_by_side(student, self.teacher, batch, self.config.temperature, add)
        student.train(was_training)
        return means(sums)

    def _batches(self, items: list[Any], what: str) -> Iterator[list[Any]]:
        size, quiet = self.config.per_device_eval_batch_size, self.config.disable_tqdm
        starts = range(0, len(items), size)
        for first in tqdm(starts, desc=f"held-out {what}", leave=False, disable=quiet):
            yield items[first : first + size]

    def _write_samples(self, completions: list[Completion], step: int) -> list[str]:
        texts, references = (
            self.tokenizer.batch_decode([c.ids for c in group], skip_special_tokens=True)
            for group in (completions, self.references)
        )
        with (Path(self.config.output_dir) / SAMPLES).open("a", encoding="utf-8") as file:
            for prompt, own, reference in zip(self.prompts, texts, references, strict=True):
                row = {"step": step, "prompt": prompt.text, "student": own, "teacher": reference}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return texts


def load_scorer(reference: str) -> Callable[[str], float]:
    """The function of file.py:function."""
    path, _, name = reference.partition(":")
    functions = runpy.run_path(path)
    if name not in functions:
        raise ValueError(f"scorer: expected file.py:function, got {reference!r}, which has none")
    return functions[name]

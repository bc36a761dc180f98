"""Held-out measurements: how far the student is from its teacher, and whether it acts like it."""

import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch
from tqdm.auto import tqdm

from opd_kernels import LazyLogits, distillation_loss
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.diagnostics import Sums
from trainer.models import Model, eval_mode
from trainer.rollout import Completion, Sampler
from trainer.teacher import Teacher, side_by_side

SAMPLES, COLUMNS = "samples/step-{}.jsonl", ("prompt", "student", "teacher")
_HELD_OUT = 1 << 31  # a seed that no training step has


@dataclass
class Evaluation:
    """Measures students on held-out prompts, on the same completions and with the same seeds."""

    config: DistillationConfig
    prompts: list[Prompt]
    teacher: Teacher
    sampler: Sampler
    references: list[Completion] = field(default_factory=list)  # the teacher's, sampled once

    def __post_init__(self) -> None:
        self.scorer = load_scorer(self.config.scorer) if self.config.scorer else None

    def measure(self, student: Model, step: int) -> dict[str, float]:
        """Figures of the student as it is; its samples go to samples/step-N.jsonl."""
        if not self.references:
            with self.teacher.active() as model:
                self.references = self._sample(model, as_teacher=True)
        own = self._sample(student)
        decode, both = self.sampler.tokenizer.batch_decode, (own, self.references)
        texts = [decode([c.ids for c in x], skip_special_tokens=True) for x in both]
        if self.config.should_save:  # one of the ranks, which all measure the same
            path = Path(self.config.output_dir) / SAMPLES.format(step)
            path.parent.mkdir(exist_ok=True)
            samples = zip(COLUMNS, ([p.text for p in self.prompts], *texts), strict=True)
            pandas.DataFrame(dict(samples)).to_json(path, orient="records", lines=True)
        fixed, on_policy = (self._divergence(student, x) for x in (self.references, own))
        metrics = {"eval_reverse_kl": fixed["kl"], "eval_overlap": fixed["overlap"]}
        metrics["eval_reverse_kl_per_completion"] = fixed["kl"] * fixed["completion_length"]
        metrics["eval_reverse_kl_on_own_samples"] = on_policy["kl"]
        metrics["eval_completion_length"] = on_policy["completion_length"]
        if self.scorer:
            metrics["eval_score"] = sum(map(self.scorer, texts[0])) / len(own)
        return metrics

    def save_references(self, path: Path) -> None:
        """The references, if they were sampled: a resumed run's teacher may have moved."""
        if self.references:
            kept = [{"ids": c.ids, "truncated": c.truncated} for c in self.references]
            path.write_text(json.dumps(kept))

    def load_references(self, path: Path) -> None:
        """Those that a checkpoint kept, unless the held-out prompts are others by now."""
        kept = json.loads(path.read_text()) if path.exists() else []
        if len(kept) == len(self.prompts):
            pairs = zip(self.prompts, kept, strict=True)
            self.references = [Completion(prompt, **saved) for prompt, saved in pairs]

    def _sample(self, model: Model, as_teacher: bool = False) -> list[Completion]:
        completions: list[Completion] = []
        for batch in self._batches(self.prompts, "completions"):
            seed = (self.config.seed, _HELD_OUT, len(completions))
            completions += self.sampler.sample(model, batch, *seed, as_teacher=as_teacher)
        return completions

    @torch.no_grad()
    def _divergence(self, student: Model, completions: list[Completion]) -> dict[str, float]:
        """Per token of the completions: the exact reverse KL `kl`, and Sums' means."""

        def add(ours: LazyLogits, theirs: LazyLogits) -> None:
            k = self.config.k
            output = distillation_loss(ours, theirs, k=k, support="full", reduction="sum")
            s, t = output.student, output.teacher
            sums.add_tokens(s, t, s, theirs)
            sums.add(kl=float(output.loss))

        sums = Sums()
        sums.add_completions(completions)
        with eval_mode(student):
            for batch in self._batches(completions, "divergence"):
                side_by_side(student, self.teacher, batch, self.config.temperature, add)
        return sums.means()

    def _batches(self, items: list[Any], what: str) -> Iterator[list[Any]]:
        size, quiet = self.config.per_device_eval_batch_size, self.config.disable_tqdm
        starts = range(0, len(items), size)
        for first in tqdm(starts, desc=f"held-out {what}", leave=False, disable=quiet):
            yield items[first : first + size]


def load_scorer(reference: str) -> Callable[[str], float]:
    """The function of file.py:function."""
    path, _, name = reference.partition(":")
    functions = runpy.run_path(path)
    if name not in functions:
        raise ValueError(f"scorer: expected file.py:function, got {reference!r}, which has none")
    return functions[name]

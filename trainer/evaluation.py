"""Held-out measurements: how far the student is from its teacher, and whether it does as it does.

The headline is the reverse KL on fixed completions, sampled once from the teacher with its privileged
context: it falls only as the student learns to continue as the teacher would. The student's own samples
give the score, and the KL where the student goes by itself, which may rise while it learns.
"""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from opd_kernels import LazyLogits, distillation_loss
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.rollout import Completion, Sampler
from trainer.teacher import Teacher, side_by_side

SAMPLES = "samples.jsonl"
_HELD_OUT = 1 << 31  # a seed that no training step has


class Evaluation:
    """Measures students on held-out prompts, on the same completions and with the same seeds."""

    def __init__(
        self,
        config: DistillationConfig,
        prompts: list[Prompt],
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.sampler = Sampler(config, teacher.model, tokenizer)
        self.scorer = load_scorer(config.scorer) if config.scorer else None
        self.references: list[Completion] = []

    def measure(self, student: nn.Module, step: int) -> dict[str, float]:
        """Figures of the student as it is; appends its samples to samples.jsonl."""
        if not self.references:
            with self.teacher.active() as model:
                self.references = self._sample(model, [p.teacher_ids for p in self.prompts])
        own = self._sample(student, [p.student_ids for p in self.prompts])
        texts = self._write_samples(own, step)
        kl, overlap = self._divergence(student, self.references)
        metrics = {
            "eval_kl": kl,
            "eval_kl_per_completion": kl * _mean_length(self.references),
            "eval_overlap": overlap,
            "eval_kl_own_samples": self._divergence(student, own)[0],
            "eval_completion_length": _mean_length(own),
        }
        if self.scorer:
            metrics["eval_score"] = sum(map(self.scorer, texts)) / len(texts)
        return metrics

    def _sample(self, model: nn.Module, contexts: list[list[int]]) -> list[Completion]:
        completions: list[Completion] = []
        for rows in self._batches("completions"):
            seed = (self.config.seed, _HELD_OUT, rows.start)
            completions += self.sampler.sample(model, contexts[rows], seed)
        return completions

    @torch.no_grad()
    def _divergence(self, student: nn.Module, completions: list[Completion]) -> tuple[float, float]:
        """Exact reverse KL per token, and overlap@K, on given completions."""

        def sums(ours: LazyLogits, theirs: LazyLogits) -> Tensor:
            k = min(self.config.k, ours.head.vocab_size)
            loss = distillation_loss(ours, theirs, k=k, support="full", reduction="sum").loss
            return torch.stack([loss, ours.topk(k).overlap(theirs.topk(k)).sum()])

        total = torch.zeros(2)
        was_training = student.training
        student.eval()
        for rows in self._batches("divergence"):
            pairs = self.prompts[rows], completions[rows]
            temperature = self.config.temperature
            total += side_by_side(student, self.teacher, *pairs, temperature, sums).cpu()
        student.train(was_training)
        kl, overlap = (total / len(completions) / _mean_length(completions)).tolist()
        return kl, overlap

    def _batches(self, what: str) -> Iterator[slice]:
        size, quiet = self.config.per_device_eval_batch_size, self.config.disable_tqdm
        starts = range(0, len(self.prompts), size)
        for first in tqdm(starts, desc=f"held-out {what}", leave=False, disable=quiet):
            yield slice(first, first + size)

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


def _mean_length(completions: list[Completion]) -> float:
    return sum(len(c.ids) for c in completions) / len(completions)


def load_scorer(reference: str) -> Callable[[str], float]:
    """The function of file.py:function."""
    path, _, name = reference.partition(":")
    functions = runpy.run_path(path) if Path(path).is_file() else {}
    if name not in functions:
        raise ValueError(f"scorer: expected file.py:function, both existing, got {reference!r}")
    return functions[name]

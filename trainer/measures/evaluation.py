"""Held-out metrics: the student's distance from its teacher, and the scores of its completions."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from opd_kernels import LazyLogits, SparseLogits, distillation_loss, reverse_kl
from opd_trainer.config import EvaluationConfig, StageConfig, TeacherConfig
from opd_trainer.data import Prompt
from opd_trainer.measures.diagnostics import Sums, across_contexts
from opd_trainer.measures.scoring import load_scorer
from opd_trainer.models.load import Model, eval_mode, reshard
from opd_trainer.models.rollout import Completion, Sampler
from opd_trainer.models.teacher import LocalTeacher, Logits, Teacher, on_completions, token_ids
from opd_trainer.run.console import hides_bars
from opd_trainer.run.directory import SAMPLES, write_whole

_HELD_OUT = 1 << 31  # a seed that no training step uses


@dataclass
class Evaluation:
    """Measures students on the same held-out prompts and with the same seeds."""

    config: StageConfig
    prompts: list[Prompt]
    teachers: dict[str, Teacher]  # by the name that prompts use; may be empty
    sampler: Sampler
    references: list[Completion] = field(default_factory=list)  # of the teachers, sampled once
    local: dict[str, LocalTeacher] = field(init=False)
    sample: Completion | None = None  # the first of the last measurement

    def __post_init__(self) -> None:
        self.scorer = load_scorer(self.config)
        self.local = {n: t for n, t in self.teachers.items() if isinstance(t, LocalTeacher)}
        self.k = self.config.k if isinstance(self.config, TeacherConfig) else 0

    def measure(self, student: Model, step: int) -> dict[str, float]:
        """Return metrics of the student; write its samples to samples/step-N.jsonl."""
        if not self.references:
            self.references = self.complete_by_teachers(self.prompts, _HELD_OUT)
        repeated = [p for p in self.prompts for _ in range(self.config.eval_completions_per_prompt)]
        seed = self.config.seed, _HELD_OUT
        samples = self.sampler.sample(student, repeated, *seed, greedy=self.config.eval_greedy)
        self.sample = samples[0]
        sums = Sums()
        sums.add_completions(samples)
        names = ("completion_length", "truncated", "repetition")
        metrics = {f"eval_{name}": sums.means()[name] for name in names}
        if self.teachers:
            metrics |= self._divergences(student, samples)
        if step == 0 and self.references:
            metrics |= self._contexts()
        if self.scorer:
            samples = self.scored(samples)
            metrics |= self._scores(samples)
        reshard(student)
        self._write_samples(step, samples)
        return metrics

    def scored(self, completions: list[Completion]) -> list[Completion]:
        """Return the completions with the scorer's numbers as rewards."""
        assert self.scorer is not None
        score, text = self.scorer, self.sampler.text
        return [replace(c, reward=score(text(c), c.prompt.row)) for c in completions]

    def _scores(self, samples: list[Completion]) -> dict[str, float]:
        count = self.config.eval_completions_per_prompt
        metrics = {"eval_score": _mean_reward(samples)}
        right = (np.array([c.reward for c in samples]).reshape(-1, count) >= 1).sum(1).tolist()
        for k in [2**i for i in range(count.bit_length()) if count > 1]:
            metrics[f"eval_pass_at_{k}"] = fmean(pass_at_k(count, c, k) for c in right)
        references = self.scored(self.references)
        if references:
            metrics["eval_teacher_score"] = _mean_reward(references)
        if isinstance(self.config, EvaluationConfig) and self.config.prefix_probe:
            metrics |= self._prefix_probe(samples, references)
        return metrics

    def _prefix_probe(
        self, samples: list[Completion], references: list[Completion]
    ) -> dict[str, float]:
        """Let the teacher continue the student's prefixes, and count the answers that change.

        The counts compare with the student's own continuation and with the teacher alone.
        """
        generator = np.random.default_rng([self.config.seed, _HELD_OUT])
        whole = [c for c in samples if len(c.ids) > 1]  # a single token has no prefix
        if not whole:
            return {}
        prefixes = [c.first(int(generator.integers(1, len(c.ids)))) for c in whole]
        prompts = [replace(c.prompt, teacher_ids=c.prompt.teacher_ids + c.ids) for c in prefixes]
        ends = self.complete_by_teachers(prompts, _HELD_OUT)
        joined = [replace(e, ids=[*c.ids, *e.ids]) for c, e in zip(prefixes, ends, strict=True)]
        continued = self.scored([c.first(self.config.max_completion_length) for c in joined])
        metrics = {"eval_probe_score": _mean_reward(continued)}
        alone = {id(c.prompt): c for c in references}
        for whose, before in (("", whole), ("teacher_", [alone[id(c.prompt)] for c in whole])):
            pairs = zip(before, continued, strict=True)
            turns = [(old.reward >= 1, new.reward >= 1) for old, new in pairs]
            metrics[f"eval_probe_{whose}right_to_wrong"] = float(turns.count((True, False)))
            metrics[f"eval_probe_{whose}wrong_to_right"] = float(turns.count((False, True)))
        return metrics

    def complete_by_teachers(self, prompts: list[Prompt], seed: int) -> list[Completion]:
        """Return the teachers' completions in the order of the prompts; [] if one is a server."""
        if len(self.local) < len(self.teachers) or not self.teachers:
            return []
        completions: dict[int, Completion] = {}
        for number, (name, teacher) in enumerate(self.local.items()):
            indices = [i for i, p in enumerate(prompts) if p.teacher == name]
            with teacher.active() as model:
                batch, seeds = [prompts[i] for i in indices], (self.config.seed, seed, number)
                samples = self.sampler.sample(model, batch, *seeds, as_teacher=True)
            completions.update(zip(indices, samples, strict=True))
        return [completions[i] for i in range(len(prompts))]

    def _divergences(self, student: Model, samples: list[Completion]) -> dict[str, float]:
        on_policy = self.divergence(student, samples)
        names = ("outside_teacher_top_k", "teacher_nll")
        metrics = {f"eval_{n}": on_policy[n] for n in names if n in on_policy}
        metrics["eval_reverse_kl_on_own_samples"] = on_policy["kl"]
        metrics["eval_overlap_on_own_samples"] = on_policy["overlap"]
        if self.references:
            fixed = self.divergence(student, self.references)
            metrics |= {"eval_reverse_kl": fixed["kl"], "eval_overlap": fixed["overlap"]}
            metrics["eval_reverse_kl_per_completion"] = fixed["kl"] * fixed["completion_length"]
        return metrics

    def _contexts(self) -> dict[str, float]:
        """Return the effect of the teachers' privileged contexts, see `across_contexts`."""
        sums, spreads = Sums(), []
        for name, teacher in self.local.items():
            references = [c for c in self.references if c.prompt.teacher == name]
            spreads += across_contexts(teacher, references, self.k, self.config.temperature)
            seen = [c for c in references if c.prompt.teacher_ids != c.prompt.student_ids]
            if seen:
                tokens = sum(len(c.ids) for c in seen)
                with teacher.active() as model:
                    kl = self.divergence(model, seen)["kl"]
                sums.add(kl=kl * tokens, scored_tokens=tokens)
        metrics = {"eval_context_kl": sums.means()["kl"]} if sums else {}
        if spreads:
            dispersion, residual = (float(torch.cat(x).mean()) for x in zip(*spreads, strict=True))
            metrics["eval_context_dispersion"] = dispersion
            metrics["eval_geometric_residual"] = residual
        return metrics

    @torch.no_grad()
    def divergence(self, student: Model, completions: list[Completion]) -> dict[str, float]:
        """Return the reverse KL per token of the completions, as `kl`, with the means of Sums.

        It is exact with a local teacher. A server returns its top-K, and the rest is one bucket,
        which makes it a lower bound.
        """
        sums, temperature = Sums(), self.config.temperature
        size, hides_bar = self.config.per_device_eval_batch_size, hides_bars(self.config)

        def add(batch: list[Completion], teacher: Logits, student: LazyLogits) -> None:
            options: dict[str, Any] = {"support": "full"}
            if isinstance(teacher, SparseLogits):
                bucket = partial(reverse_kl, tail="bucket")
                options = {"support": "teacher", "missing": "drop", "objective": bucket}
            output = distillation_loss(student, teacher, k=self.k, reduction="sum", **options)
            sums.add_tokens(output.student, output.teacher)
            ids = token_ids(batch, output.student.ids.device)
            top = output.student if isinstance(teacher, LazyLogits) else student.topk(self.k)
            sums.add_positions(top, teacher, ids, [len(c.ids) for c in batch])
            sums.add(kl=float(output.loss))

        sums.add_completions(completions)
        with eval_mode(student):
            for name, teacher in self.teachers.items():
                scored = [c for c in completions if c.prompt.teacher == name]
                teacher.prepare(scored)
                starts = range(0, len(scored), size)
                for start in tqdm(starts, "held-out divergence", leave=False, disable=hides_bar):
                    batch = scored[start : start + size]
                    logits = teacher.logits(batch, temperature)
                    on_completions(student, batch, temperature, partial(add, batch, logits))
        return sums.means()

    def _write_samples(self, step: int, samples: list[Completion]) -> None:
        if not self.config.should_save:  # all ranks have the same samples, and one writes them
            return
        first = samples[:: self.config.eval_completions_per_prompt]
        columns: dict[str, list[Any]] = {"prompt": [p.text for p in self.prompts]}
        columns["student"] = [self.sampler.text(c) for c in first]
        if self.references:
            columns["teacher"] = [self.sampler.text(c) for c in self.references]
        if self.scorer:
            columns["score"] = [c.reward for c in first]
        path = Path(self.config.output_dir) / SAMPLES.format(step)
        path.parent.mkdir(exist_ok=True, parents=True)
        write_whole(path, pandas.DataFrame(columns).to_json(orient="records", lines=True))

    def save_references(self, path: Path) -> None:
        """Save the references if there are any: the teacher of a resumed run may have moved."""
        if self.references:
            kept = [
                {"context": c.prompt.teacher_ids, "ids": c.ids, "truncated": c.truncated}
                for c in self.references
            ]
            path.write_text(json.dumps(kept))

    def load_references(self, path: Path) -> None:
        """Load a checkpoint's references, unless the held-out prompts have changed."""
        kept = json.loads(path.read_text()) if path.exists() else []
        if [saved.pop("context") for saved in kept] == [p.teacher_ids for p in self.prompts]:
            pairs = zip(self.prompts, kept, strict=True)
            self.references = [Completion(prompt, **saved) for prompt, saved in pairs]


def _mean_reward(completions: list[Completion]) -> float:
    return fmean(c.reward for c in completions)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return an unbiased estimate that one of k samples is right: arXiv 2107.03374 equation 1."""
    return 1 - comb(samples - right, k) / comb(samples, k)

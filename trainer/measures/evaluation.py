"""Held-out measurements: how far the student is from its teacher, and whether it acts like it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from opd_kernels import LazyLogits, SparseLogits, distillation_loss, reverse_kl
from trainer.config import EvaluationConfig, StageConfig, TeacherConfig
from trainer.data import Prompt
from trainer.measures.diagnostics import Sums
from trainer.measures.privileged import across_contexts
from trainer.measures.scoring import load_scorer
from trainer.models.load import Model, eval_mode, reshard
from trainer.models.rollout import Completion, Sampler
from trainer.models.teacher import LocalTeacher, Teacher, side_by_side, token_ids
from trainer.run.directory import SAMPLES, write_whole

_HELD_OUT = 1 << 31  # a seed that no training step has


@dataclass
class Evaluation:
    """Measures students on held-out prompts, on the same completions and with the same seeds."""

    config: StageConfig
    prompts: list[Prompt]
    teachers: dict[str, Teacher]  # by the name that prompts have for them; none is fine
    sampler: Sampler
    references: list[Completion] = field(default_factory=list)  # the teachers', sampled once
    local: dict[str, LocalTeacher] = field(init=False)

    def __post_init__(self) -> None:
        self.scorer = load_scorer(self.config)
        self.local = {n: t for n, t in self.teachers.items() if isinstance(t, LocalTeacher)}

    def measure(self, student: Model, step: int) -> dict[str, float]:
        """Figures of the student as it is; its samples go to samples/step-N.jsonl."""
        if not self.references:
            self.references = self.continued(self.prompts, _HELD_OUT)
        count, greedy = self.config.eval_completions_per_prompt, self.config.eval_greedy
        repeated = [p for p in self.prompts for _ in range(count)]
        seed = self.config.seed, _HELD_OUT
        own = self.sampler.sample(student, repeated, *seed, greedy=greedy)
        sums = Sums()
        sums.add_completions(own)
        names = ("completion_length", "truncated", "repetition")
        metrics = {f"eval_{name}": sums.means()[name] for name in names}
        if self.teachers:
            metrics |= self._divergences(student, own)
        if step == 0 and self.references:
            metrics |= self._contexts()
        if self.scorer:
            metrics |= self._scores(own)
        reshard(student)
        self._write_samples(step, own)
        return metrics

    def _scores(self, own: list[Completion]) -> dict[str, float]:
        count, scores = self.config.eval_completions_per_prompt, self.score(own)
        metrics = {"eval_score": sum(scores) / len(scores)}
        right = (np.array(scores).reshape(-1, count) >= 1).sum(1).tolist()
        for k in [2**i for i in range(count.bit_length()) if count > 1]:
            metrics[f"eval_pass_at_{k}"] = sum(pass_at_k(count, c, k) for c in right) / len(right)
        alone = self.score(self.references)
        if alone:
            metrics["eval_teacher_score"] = sum(alone) / len(alone)
        if isinstance(self.config, EvaluationConfig) and self.config.prefix_probe:
            metrics |= self._prefix_probe(own, scores, alone)
        return metrics

    def score(self, completions: list[Completion]) -> list[float]:
        """The scorer's number for each."""
        assert self.scorer is not None
        return [self.scorer(self.sampler.text(c), c.prompt.row) for c in completions]

    def _prefix_probe(
        self, own: list[Completion], scores: list[float], alone: list[float]
    ) -> dict[str, float]:
        """Whether the teacher does better or worse when it goes on from the student's prefixes:
        than the student who went on itself, and than it did alone.
        """
        generator = np.random.default_rng([self.config.seed, _HELD_OUT])
        pairs = [(c, s) for c, s in zip(own, scores, strict=True) if len(c.ids) > 1]
        if not pairs:  # what has ended at once cannot be cut
            return {}
        prefixes = [c.ids[: int(generator.integers(1, len(c.ids)))] for c, _ in pairs]
        prompts = [
            replace(c.prompt, teacher_ids=c.prompt.teacher_ids + prefix)
            for (c, _), prefix in zip(pairs, prefixes, strict=True)
        ]
        length = self.config.max_completion_length
        continued = self.score([
            replace(c, ids=[*prefix, *c.ids][:length])
            for c, prefix in zip(self.continued(prompts, _HELD_OUT), prefixes, strict=True)
        ])  # fmt: skip
        figures = {"eval_probe_score": sum(continued) / len(continued)}
        teachers = dict(zip(map(id, self.prompts), alone, strict=True))
        of_teacher = [teachers[id(c.prompt)] for c, _ in pairs]
        for whose, before in (("", [s for _, s in pairs]), ("teacher_", of_teacher)):
            turns = [(s >= 1, new >= 1) for s, new in zip(before, continued, strict=True)]
            figures[f"eval_probe_{whose}right_to_wrong"] = float(turns.count((True, False)))
            figures[f"eval_probe_{whose}wrong_to_right"] = float(turns.count((False, True)))
        return figures

    def continued(self, prompts: list[Prompt], seed: int) -> list[Completion]:
        """The local teachers' completions, in the order of the prompts; of no others."""
        if len(self.local) < len(self.teachers) or not self.teachers:
            return []
        found: dict[int, Completion] = {}
        for number, (name, teacher) in enumerate(self.local.items()):
            own = [i for i, p in enumerate(prompts) if p.teacher == name]
            with teacher.active() as model:
                theirs, seeds = [prompts[i] for i in own], (self.config.seed, seed, number)
                samples = self.sampler.sample(model, theirs, *seeds, as_teacher=True)
            found.update(zip(own, samples, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _divergences(self, student: Model, own: list[Completion]) -> dict[str, float]:
        on_policy = self.divergence(student, own)
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
        """What the teachers' privileged context changes, see privileged.py."""
        sums, spreads = Sums(), []
        for name, teacher in self.local.items():
            own = [c for c in self.references if c.prompt.teacher == name]
            seen = [c for c in own if c.prompt.teacher_ids != c.prompt.student_ids]
            spreads += across_contexts(teacher, own, self._k, self.config.temperature)
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

    @property
    def _k(self) -> int:
        assert isinstance(self.config, TeacherConfig)
        return self.config.k

    @torch.no_grad()
    def divergence(self, student: Model, completions: list[Completion]) -> dict[str, float]:
        """Per token of the completions: the reverse KL `kl`, and Sums' means.

        It is exact with a local teacher; a server tells its top-K and the rest is one bucket, so
        that it is a lower bound.
        """
        k, temperature = self._k, self.config.temperature
        batch: list[Completion] = []

        def add(ours: LazyLogits, theirs: LazyLogits | SparseLogits) -> None:
            if isinstance(theirs, LazyLogits):
                loss = partial(distillation_loss, support="full")
            else:
                loss = partial(distillation_loss, support="teacher", missing="drop")
                loss = partial(loss, objective=partial(reverse_kl, tail="bucket"))
            output = loss(ours, theirs, k=k, reduction="sum")
            sums.add_tokens(output.student, output.teacher)
            ids = token_ids(batch, output.student.ids.device)
            top = output.student if isinstance(theirs, LazyLogits) else ours.topk(k)
            sums.add_positions(top, theirs, ids, [len(c.ids) for c in batch])
            sums.add(kl=float(output.loss))

        sums = Sums()
        sums.add_completions(completions)
        with eval_mode(student):
            for name, teacher in self.teachers.items():
                own = [c for c in completions if c.prompt.teacher == name]
                teacher.prepare(own)
                for batch in self._batches(own):
                    side_by_side(student, teacher, batch, temperature, add)
        return sums.means()

    def _batches(self, items: list[Any]) -> Iterator[list[Any]]:
        size, quiet = self.config.per_device_eval_batch_size, self.config.disable_tqdm
        starts = range(0, len(items), size)
        for first in tqdm(starts, desc="held-out divergence", leave=False, disable=quiet):
            yield items[first : first + size]

    def _write_samples(self, step: int, own: list[Completion]) -> None:
        if not self.config.should_save:  # one of the ranks, which all measure the same
            return
        first = own[:: self.config.eval_completions_per_prompt]
        columns: dict[str, list[Any]] = {"prompt": [p.text for p in self.prompts]}
        columns["student"] = [self.sampler.text(c) for c in first]
        if self.references:
            columns["teacher"] = [self.sampler.text(c) for c in self.references]
        if self.scorer:
            columns["score"] = self.score(first)
        path = Path(self.config.output_dir) / SAMPLES.format(step)
        path.parent.mkdir(exist_ok=True, parents=True)
        write_whole(path, pandas.DataFrame(columns).to_json(orient="records", lines=True))

    def save_references(self, path: Path) -> None:
        """The references, if they were sampled: a resumed run's teacher may have moved."""
        if self.references:
            kept = [
                {"context": c.prompt.teacher_ids, "ids": c.ids, "truncated": c.truncated}
                for c in self.references
            ]
            path.write_text(json.dumps(kept))

    def load_references(self, path: Path) -> None:
        """Those that a checkpoint kept, unless the held-out prompts are others by now."""
        kept = json.loads(path.read_text()) if path.exists() else []
        if [saved.pop("context") for saved in kept] == [p.teacher_ids for p in self.prompts]:
            pairs = zip(self.prompts, kept, strict=True)
            self.references = [Completion(prompt, **saved) for prompt, saved in pairs]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k of the samples is right, unbiased: arXiv 2107.03374 equation 1."""
    return 1 - comb(samples - right, k) / comb(samples, k)

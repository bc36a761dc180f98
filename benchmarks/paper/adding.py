"""The runs of claims 2 to 4: models of various skill that write running totals in two formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.paper.models import write_random_model
from benchmarks.paper.runs import Laboratory, Line, Run, curve
from benchmarks.paper.sums import Style, sums

PLAIN: tuple[Style, ...] = ("plain",)
RESTATED: tuple[Style, ...] = ("restated",)
_PROMPTS, _HELD_OUT = 1 << 20, 1 << 21  # seeds apart from those of the models
_HELD_OUT_PROMPTS = 512


@dataclass(frozen=True)
class Adding:
    """Makes the runs on running totals of one laboratory."""

    lab: Laboratory

    def sft(
        self, name: str, seed: int, styles: Sequence[Style], large: bool = False, **changes: Any
    ) -> Run:
        """A model that learns to add from random weights; a large one has 0.9 million of them."""
        sizes = {"hidden_size": 192, "layers": 3} if large else {"layers": 2}
        start = self.lab.root / "random" / f"adding-{'large' if large else 'small'}-{seed}"
        model = write_random_model(start, seed, chat=True, **sizes)
        rows = partial(sums, 9600, seed, styles)
        data = self.lab.data(f"sums-{'-'.join(styles)}-{seed}", rows)
        keys = {"model": model, "train_data": data, "seed": seed}
        return self._run(f"{name}-{seed}", "sft", keys | changes)

    def teacher(self, seed: int) -> Run:
        """A model that adds in the plain format and is nearly always right."""
        return self.sft("teacher", seed, PLAIN)

    def half_trained(self, seed: int, styles: Sequence[Style] = PLAIN, *, steps: int) -> Run:
        """A model after a part of the batches."""
        return self.sft(f"{'-'.join(styles)}-{steps}", seed, styles, max_steps=steps)

    def reinforced(self, student: Run, seed: int) -> Run:
        """The student after reinforcement learning from right answers."""
        return self._run(
            f"reinforced-{seed}", "rlvr", {"model": student.model, "seed": seed}, student
        )

    def imitate(self, student: Run, teacher: Run, seed: int, steps: int) -> Run:
        """A student after SFT on completions that a teacher writes."""
        prompts = self.lab.data("sums-few-prompts", partial(sums, 96 * steps, _PROMPTS))
        keys = {
            "model": student.model, "teacher": teacher.model, "generate_from": "teacher",
            "train_data": prompts, "max_steps": steps, "eval_steps": steps, "seed": seed,
        }  # fmt: skip
        return self._run(f"imitating-{seed}", "sft", keys, student, teacher)

    def distill(
        self, name: str, student: Run, teacher: Run, seed: int, checkpoint: int | None = None,
        **changes: Any,
    ) -> Run:  # fmt: skip
        """A student's on-policy distillation from a teacher, or from one of its checkpoints."""
        keys = {"model": student.model, "teacher": at_step(teacher, checkpoint), "seed": seed}
        return self._run(f"{name}-{seed}", "distill", keys | changes, student, teacher)

    def probe(self, student: Run, teacher: Run, seed: int) -> Run:
        """An evaluation in which the teacher continues prefixes of the student's completions."""
        keys = {"model": student.model, "teacher": teacher.model, "seed": seed}
        return self._run(f"probe-{student.folder.name}", "evaluate", keys, student, teacher)

    def _run(self, name: str, stage: str, keys: dict[str, Any], *needs: Run) -> Run:
        held_out = partial(sums, _HELD_OUT_PROMPTS, _HELD_OUT)
        keys = {"eval_data": self.lab.data("sums-held-out", held_out)} | keys
        if stage in ("rlvr", "distill"):
            prompts = partial(sums, 9600, _PROMPTS)
            keys = {"train_data": self.lab.data("sums-prompts", prompts)} | keys
        return Run(self.lab.root / "adding" / name, stage, f"sums_{stage}.yaml", keys, needs)


def at_step(run: Run, checkpoint: int | None) -> str:
    """Return the path of a run's student at a checkpoint, or at its end."""
    return run.model if checkpoint is None else str(run.folder / f"checkpoint-{checkpoint}")


def nearest(lines: list[Line], score: float) -> tuple[int, float]:
    """Return the step with the held-out score nearest to the given one, and that score."""
    return min(zip(*curve(lines, "eval_score"), strict=True), key=lambda x: abs(x[1] - score))

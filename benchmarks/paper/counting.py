"""The runs of claim 1: models of the counting language, and the objectives that it compares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.paper.models import write_random_model
from benchmarks.paper.runs import RECIPES, Laboratory, Line, Run, last
from benchmarks.paper.tasks import Language, Row, alternating, mixed, shuffled

Rows = Callable[[], list[Row]]
SUPPORTS = (1, 3, 5, 20)  # K
TUNING_SEED = 0  # only for the runs that choose the learning rates
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
HIGH_RATE = 3e-3  # learning rate that shows the effect of the log-ratio within the steps
TEMPERATURES = (1.0, 0.7, 0.5)
HALF_TRAINED, TRAINED = 15, 200  # batches of SFT
_HELD_OUT, _PROMPTS = 1 << 20, (1 << 20) + 1  # seeds apart from those of the models


@dataclass(frozen=True)
class Objective:
    """An objective to compare: its recipe keys, and whether it has a top-K support."""

    name: str
    changes: dict[str, Any]
    has_support: bool = True

    @property
    def supports(self) -> tuple[int, ...]:
        """The values of K to run; without a support K only sets what is measured, and is 20."""
        if not self.has_support:
            return (20,)
        return SUPPORTS[1:] if self.changes.get("tail") == "renormalize" else SUPPORTS


BIASED = Objective("no stop-gradient", {"stop_gradient": False})
STOPPED = Objective("stop-gradient", {})
RENORMALIZED = Objective("renormalised", {"tail": "renormalize"})
BUCKET = Objective("tail bucket", {"tail": "bucket"})
FULL = Objective("full reverse KL", {"support": "full"}, has_support=False)
SAMPLED = Objective("policy gradient", {"objective": "policy_gradient"}, has_support=False)
RATIO = Objective(
    "log-ratio as loss",
    {"objective": f"{RECIPES}/log_ratio.py:log_ratio", "support": "sampled"},
    has_support=False,
)
OBJECTIVES = (BIASED, STOPPED, RENORMALIZED, BUCKET, FULL, SAMPLED, RATIO)


@dataclass(frozen=True)
class Counting:
    """Makes the runs on the counting language of one laboratory."""

    lab: Laboratory

    def sft(self, name: str, seed: int, rows: Rows, steps: int = TRAINED) -> Run:
        """A model trained from random weights on a number of batches of these completions."""
        start = write_random_model(self.lab.root / "random" / f"letters-{seed}", seed)
        data = self.lab.data(f"{name}-{seed}", rows)
        changes = {"model": start, "train_data": data, "eval_data": None, "max_steps": steps}
        folder = self.lab.root / "counting" / f"{name}-{seed}"
        return Run(folder, "sft", "counting_sft.yaml", changes | {"seed": seed})

    def student(self, seed: int) -> Run:
        """A model that is half trained on the language."""
        return self.sft("student", seed, partial(Language().rows, 6400, seed), HALF_TRAINED)

    def teacher(self, seed: int) -> Run:
        """The student's model, trained thirteen times as long on the same completions."""
        return self.sft("teacher", seed, partial(Language().rows, 6400, seed))

    def distill(self, objective: Objective, k: int, seed: int, **changes: Any) -> Run:
        """The distillation of the half-trained student, with changes of the recipe's keys."""
        student, teacher = self.student(seed), self.teacher(seed)
        prompts = partial(Language().rows, 3840, _PROMPTS)
        held_out = partial(Language().rows, 128, _HELD_OUT)
        keys = {"model": student.model, "teacher": teacher.model}
        keys |= self._data("counting", prompts, held_out)
        return self._run(objective, k, seed, keys, changes, (student, teacher))

    def between_teachers(self, objective: Objective, k: int, seed: int, temperature: float) -> Run:
        """The distillation of a student that cannot tell which of two teachers scores it.

        The teachers prefer the same twenty steps in different orders. The student is trained on
        completions of both.
        """
        languages = [shuffled(2 * seed + i) for i in range(2)]
        rows = [partial(x.rows, 3200, 10 * seed + i) for i, x in enumerate(languages)]
        teachers = {n: self.sft(f"order-{n}", seed, x) for n, x in zip("ab", rows, strict=True)}
        student = self.sft("orders", seed, lambda: mixed([x() for x in rows]))
        keys = {"model": student.model, "teacher": {n: x.model for n, x in teachers.items()}}
        keys |= self._data(
            "orders", partial(alternating, 3840, "ab"), partial(alternating, 192, "ab")
        )
        changes = {"temperature": temperature, "max_steps": 80, "eval_steps": 80, "scorer": None}
        return self._run(objective, k, seed, keys, changes, (student, *teachers.values()))

    def _data(self, name: str, prompts: Rows, held_out: Rows) -> dict[str, str]:
        return {
            "train_data": self.lab.data(f"{name}-prompts", prompts),
            "eval_data": self.lab.data(f"{name}-held-out", held_out),
        }

    def _run(
        self, objective: Objective, k: int, seed: int, keys: dict[str, Any],
        changes: dict[str, Any], needs: tuple[Run, ...],
    ) -> Run:  # fmt: skip
        parts = [objective.name, f"k{k}", *(f"{n}={x}" for n, x in changes.items()), str(seed)]
        folder = self.lab.root / "counting" / "-".join(parts).replace(" ", "-")
        keys = {"k": k, "seed": seed} | keys | objective.changes | changes
        return Run(folder, "distill", "counting_distill.yaml", keys, needs)


@dataclass
class Measured:
    """The log lines of claim 1's runs, with one entry per seed except in rates."""

    rates: dict[str, dict[float, list[Line]]]  # by objective and learning rate, for TUNING_SEED
    compared: dict[tuple[str, int], list[list[Line]]]  # by objective and K
    high_rate: list[list[Line]]  # of the log-ratio
    drifts: dict[tuple[str, int, float], list[list[Line]]]  # by objective, K and temperature

    def best_rate(self, objective: Objective) -> float:
        """Return the learning rate of an objective in the comparison."""
        return best_rate(self.rates[objective.name])


def best_rate(results: dict[float, list[Line]]) -> float:
    """Return the learning rate with the lowest held-out reverse KL."""
    return min(results, key=lambda rate: last(results[rate], "eval_reverse_kl"))

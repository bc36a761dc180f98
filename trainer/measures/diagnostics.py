"""What a step logs beside its loss: sums over tokens that add up across micro-batches and ranks,
and alarms when they show a known way to fail.
"""

import sys
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opd_kernels import LazyLogits, SparseLogits
from opd_kernels.loss.supports import Served
from trainer.config import DistillationConfig, StageConfig
from trainer.models.rollout import Completion

POSITIONS = (0, 16, 64, 256, 1024)  # of a token in its completion, where a range of them begins
BY_POSITION = ("teacher_nll", "teacher_entropy", "overlap")
WINDOW = 5  # log lines
DRIFT = (
    "The support holds less than 95 % of the student's mass and the rest is dropped, so the loss "
    "can fall while mass drifts off it: use tail: bucket, support: full, a larger k or a lower "
    "temperature."
)
SKIPPED = (
    "Not finite: a step was left out, whose gradient had NaN or inf: see grad_norm before it, and "
    "lower learning_rate or max_grad_norm."
)
BIAS = (
    "Biased gradient: without stop-gradient the support's share of the student's mass fell from "
    "{:.2f} to {:.2f}, as it does before a collapse: set stop_gradient: true or tail: bucket."
)
REPETITION = (
    "Repetition: {:.0%} of 3-grams occurred before, after {:.0%} at the start, as in a "
    "collapse: lower "
    "learning_rate, and see that nothing biases the gradient."
)
LENGTH = (
    "Truncated: {:.0%} of completions do not end, after {:.0%} at the start: set skip_truncated, "
    "lower learning_rate, or raise max_completion_length."
)
MISMATCH = (
    "Mismatch: {:.0%} of the student's tokens are outside the teacher's top-K, so that it scores "
    "prefixes which it would not write: run the sft stage on its completions first, or take a "
    "teacher closer to the student."
)


class Sums(dict[str, float]):
    """Totals by name; a name that was never added is 0."""

    COUNTS = (
        "tokens", "scored_tokens", "completions", "truncated", "repetition", "seconds",
        "skipped_steps",
    )  # fmt: skip
    PER_COMPLETION = ("truncated", "repetition", "reward", "informative")

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, **values: float) -> None:
        """Add to the totals."""
        self.update({name: self[name] + value for name, value in values.items()})

    def add_completions(self, completions: list[Completion]) -> None:
        """Add the tokens, completions, those truncated, and each one's share of repetition."""
        for c in completions:
            self.add(tokens=len(c.ids), completions=1, truncated=c.truncated)
            self.add(repetition=repetition(c.ids), reward=c.reward, informative=c.advantage != 0)

    @torch.no_grad()
    def add_tokens(self, s: SparseLogits, t: SparseLogits) -> None:
        """Add both models' mass on S, and the norms on S, per token, of the gradient of reverse KL
        with stop-gradient, p (c - m), and of what is added without one, p (1 - P).
        """
        p = s.log_probs.exp()
        shared = (s.log_probs > -torch.inf) & (t.log_probs > -torch.inf)
        c = torch.where(shared, s.log_probs - t.log_probs, 0.0)
        gradient = torch.where(shared, p * (c - (p * c).sum(-1, keepdim=True)), 0.0)
        self._add(
            student_mass=s.mass,
            teacher_mass=t.mass,
            gradient_norm_on_s=gradient.norm(dim=-1),
            bias_norm=(1 - s.mass) * p.norm(dim=-1),
        )

    @torch.no_grad()
    def add_positions(
        self,
        student_top: SparseLogits,
        teacher: LazyLogits | SparseLogits,
        ids: Tensor,
        lengths: list[int],
    ) -> None:
        """Add how the teacher takes the sampled ids [N], over all and by position: its negative
        log-likelihood and entropy in nats, and the overlap of both top-K.
        """
        k = student_top.ids.shape[-1]
        if isinstance(teacher, LazyLogits):
            top = teacher.topk(k, entropy=True)
            nll = top.lse - teacher.gather(ids[:, None], tail=False).values[:, 0]
        else:  # its best, and the token itself
            top, nll = Served(teacher).topk(k), -teacher.at(ids[:, None]).log_probs[:, 0]
        known = nll < torch.inf  # a server's answer may lack the token
        figures = {
            "overlap": student_top.overlap(top),
            "outside_teacher_top_k": (top.ids != ids[:, None]).all(-1).float(),
            "teacher_nll": torch.where(known, nll, 0.0),
        }
        if top.entropy is not None:
            figures["teacher_entropy"] = top.entropy
        self._add(**figures)
        if student_top.entropy is not None:
            self._add(student_entropy=student_top.entropy)
        self.add(scored_tokens=float(ids.shape[0]))
        position = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
        for first, last in zip(POSITIONS, [*POSITIONS[1:], sys.maxsize], strict=True):
            inside = (position >= first) & (position < last)
            self._add(**{f"scored_tokens_from_{first}": inside.float()})
            shown = {name: figure for name, figure in figures.items() if name in BY_POSITION}
            self._add(**{f"{name}_from_{first}": x * inside for name, x in shown.items()})

    def _add(self, **figures: Tensor) -> None:
        totals = torch.stack([figure.sum().double() for figure in figures.values()])
        self.add(**dict(zip(figures, totals.tolist(), strict=True)))

    def means(self) -> dict[str, float]:
        """Per token, and per completion where that is the unit; what no token had is left out."""
        completions = max(1.0, self["completions"])
        means = {"completion_length": self["tokens"] / completions}
        for name, total in self.items():
            if name in self.PER_COMPLETION:
                means[name] = total / completions
            elif name not in self.COUNTS and not name.startswith("scored_tokens"):
                _, is_ranged, first = name.rpartition("_from_")
                counted = self[f"scored_tokens_from_{first}" if is_ranged else "scored_tokens"]
                if counted > 0:
                    means[name] = total / counted
        if gradient := means.pop("gradient_norm_on_s", 0.0):
            means["bias_ratio"] = means.pop("bias_norm") / gradient
        return means


def alarms(config: StageConfig, lines: list[dict[str, Any]]) -> str:
    """What the last of a run's log lines shows for the first time of known ways to fail, or ""."""
    told = " ".join(line.get("alarm", "") for line in lines)
    return " ".join(
        sign.format(*values)
        for sign, *values in _signs(config, [x for x in lines if "loss" in x])
        if sign.partition(":")[0] not in told
    )


def _signs(config: StageConfig, lines: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Messages with what belongs into them. A trend is from the first lines to the last."""
    now = lines[-1]
    if now["skipped_steps"] and not config.fp16:  # whose scaler looks for its scale so
        yield (SKIPPED,)
    drops = isinstance(config, DistillationConfig) and config.drops_mass
    if drops and now.get("student_mass", 1.0) < 0.95:
        yield (DRIFT,)
    if len(lines) < 2 * WINDOW:
        return

    def trend(name: str) -> tuple[float, float]:
        values = [line[name] for line in lines if name in line] or [0.0]
        return fmean(values[:WINDOW]), fmean(values[-WINDOW:])

    for sign, name, rise in ((REPETITION, "repetition", 0.2), (LENGTH, "truncated", 0.3)):
        start, end = trend(name)
        if end > start + rise:
            yield sign, end, start
    start, end = trend("student_mass")
    if isinstance(config, DistillationConfig) and not config.stop_gradient and end < start - 0.1:
        yield BIAS, start, end
    _, outside = trend("outside_teacher_top_k")
    if outside > 0.3:
        yield MISMATCH, outside


def repetition(ids: list[int]) -> float:
    """The share of a completion's 3-grams that occurred in it before."""
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0

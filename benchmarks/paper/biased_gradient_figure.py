"""The figure of claim 1."""

import math
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.paper.counting import (
    BIASED,
    BUCKET,
    FULL,
    HIGH_RATE,
    OBJECTIVES,
    RATES,
    RATIO,
    RENORMALIZED,
    SAMPLED,
    STOPPED,
    SUPPORTS,
    TEMPERATURES,
    Measured,
)
from benchmarks.paper.figures import band, level, panels, points, save
from benchmarks.paper.runs import by_seed, first, last

COLORS = {
    BIASED.name: "tab:red", STOPPED.name: "tab:blue", RENORMALIZED.name: "tab:cyan",
    BUCKET.name: "tab:green", FULL.name: "black", SAMPLED.name: "tab:purple",
    RATIO.name: "tab:orange",
}  # fmt: skip
WARMTH = dict(zip(TEMPERATURES, ("tab:red", "tab:orange", "tab:blue"), strict=True))


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure, (mass, kl, score, shape, rates, drift) = panels(2, 3, (
        "mass on S, K = 3", "reverse KL to the teacher at the end", "accuracy at the end",
        "length of completions and repetition", "reverse KL at the end by learning rate, K = 3",
        "mass on S, K = 20, under two teachers that disagree",
    ))  # fmt: skip
    for name in (BIASED.name, STOPPED.name, RENORMALIZED.name, BUCKET.name):
        band(mass, m.compared[name, 3], "student_mass", COLORS[name], name)
    teacher_mass = fmean(by_seed(m.compared[BIASED.name, 3], last, "teacher_mass"))
    level(mass, teacher_mass / math.e, "Q / e", left=True)
    mass.set(ylim=(0, 1), xlabel="step")
    _by_support(kl, m, "eval_reverse_kl")
    _by_support(score, m, "eval_score")
    kl.set_yscale("log")
    before = m.compared[FULL.name, 20]
    level(kl, fmean(by_seed(before, first, "eval_reverse_kl")), "before")
    level(score, fmean(by_seed(before, first, "eval_score")), "before")
    level(score, fmean(by_seed(before, last, "eval_teacher_score")), "teacher", "black")
    _shape(shape, m)
    for name, results in m.rates.items():
        ends = [last(results[rate], "eval_reverse_kl") for rate in RATES]
        rates.plot(RATES, ends, "o-", color=COLORS[name], label=name, ms=4)
    level(rates, first(m.rates[FULL.name][RATES[0]], "eval_reverse_kl"), "before", left=True)
    rates.set(xscale="log", yscale="log", xlabel="learning rate")
    for temperature, color in WARMTH.items():
        for name, line in ((STOPPED.name, "-"), (BUCKET.name, "--"), (FULL.name, ":")):
            label = f"temperature {temperature:g}" if line == "-" else None
            band(drift, m.drifts[name, 20, temperature], "student_mass", color, label, line)
    drift.set(xlabel="step", ylim=(0.5, 1.01))
    return save(figure, path, legends=[mass, score, drift])


def _by_support(axis: Axes, m: Measured, metric: str) -> None:
    ticks = list(range(len(SUPPORTS)))
    for objective in OBJECTIVES:
        ks = objective.supports
        values = [by_seed(m.compared[objective.name, k], last, metric) for k in ks]
        positions = ticks[-len(ks) :] if objective.has_support else [len(SUPPORTS)]
        points(axis, positions, values, COLORS[objective.name], objective.name)
    axis.set_xticks([*ticks, len(SUPPORTS)], [*(f"K = {k}" for k in SUPPORTS), "no top-K"])


def _shape(axis: Axes, m: Measured) -> None:
    other = axis.twinx()
    cases = {
        f"{RATIO.name}, {HIGH_RATE:g}": (m.high_rate, RATIO.name),
        f"{BIASED.name}, K = 3": (m.compared[BIASED.name, 3], BIASED.name),
        f"{STOPPED.name}, K = 3": (m.compared[STOPPED.name, 3], STOPPED.name),
    }
    for label, (results, name) in cases.items():
        band(axis, results, "completion_length", COLORS[name], label)
        band(other, results, "repetition", COLORS[name], None, "--")
    axis.set(xlabel="step", ylabel="letters (solid)", ylim=(0, 32))
    other.set(ylabel="share of repeated 3-grams (dashed)", ylim=(0, 1.3))
    axis.legend(fontsize=7, frameon=False, loc="upper left")

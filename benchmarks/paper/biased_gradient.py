"""Claim 1: reverse KL cut to a top-K has a biased gradient; stop-gradient repairs most of it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.paper.biased_gradient_figure import draw
from benchmarks.paper.counting import (
    BIASED,
    BUCKET,
    FULL,
    HIGH_RATE,
    OBJECTIVES,
    RATES,
    RATIO,
    RENORMALIZED,
    STOPPED,
    SUPPORTS,
    TEMPERATURES,
    TUNING_SEED,
    Counting,
    Measured,
    Objective,
    best_rate,
)
from benchmarks.paper.page import Claim, Finding, falls, rises, spread
from benchmarks.paper.runs import Laboratory, Line, Run, by_seed, first, last

Lines = list[Line]
DRIFTING = ((BUCKET, 20), (FULL, 20), (STOPPED, 20), (BUCKET, 5), (STOPPED, 5))


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 1; its figure is written to the folder."""
    measured = measure(lab, seeds)
    return Claim(
        1, [compared_table(measured), drift_table(measured)], values(measured),
        draw(measured, folder / "paper_biased_gradient.png"), findings(measured),
    )  # fmt: skip


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Train the models, choose the learning rates, and compare the objectives."""
    counting = Counting(lab)

    def at_rate(objective: Objective, rate: float) -> Run:
        k = 3 if objective.has_support else 20
        return counting.distill(objective, k, TUNING_SEED, learning_rate=rate)

    bases = [x for s in (TUNING_SEED, *seeds) for x in (counting.student(s), counting.teacher(s))]
    lab.measure(bases, "claim 1, models")
    pairs = [(objective, rate) for objective in OBJECTIVES for rate in RATES]
    results = lab.measure([at_rate(*pair) for pair in pairs], "claim 1, learning rates")
    rates: dict[str, dict[float, Lines]] = {x.name: {} for x in OBJECTIVES}
    for (objective, rate), lines in zip(pairs, results, strict=True):
        rates[objective.name][rate] = lines
    cases = [(x, k, best_rate(rates[x.name])) for x in OBJECTIVES for k in x.supports]
    compared = _each(lab, seeds, "claim 1, objectives", {
        (x.name, k): [counting.distill(x, k, s, learning_rate=rate) for s in seeds]
        for x, k, rate in cases
    })  # fmt: skip
    high = [counting.distill(RATIO, 20, s, learning_rate=HIGH_RATE) for s in seeds]
    between = {
        (x.name, k, t): [counting.between_teachers(x, k, s, t) for s in seeds]
        for t in TEMPERATURES for x, k in DRIFTING
    }  # fmt: skip
    needed = {x.folder: x for group in between.values() for run in group for x in run.needs}
    lab.measure(list(needed.values()), "claim 1, two teachers")
    drifts = _each(lab, seeds, "claim 1, mass on S", between)
    return Measured(rates, compared, lab.measure(high, "claim 1, high rate"), drifts)


def _each(
    lab: Laboratory, seeds: Sequence[int], label: str, groups: dict[Any, list[Run]]
) -> dict[Any, list[Lines]]:
    results = lab.measure([run for group in groups.values() for run in group], label)
    count = len(seeds)
    parts = [results[i : i + count] for i in range(0, len(results), count)]
    return dict(zip(groups, parts, strict=True))


def compared_table(m: Measured) -> str:
    """Divergence, accuracy and mass on S at the end, by objective."""
    header = (
        "objective", "K", "learning rate", "reverse KL to the teacher", "accuracy", "mass on S",
        "Q / e", "letters", "repetition",
    )  # fmt: skip
    before = m.compared[FULL.name, 20]
    names = ("eval_reverse_kl", "eval_score", "eval_completion_length", "eval_repetition")
    kl, score, length, repeated = (spread(by_seed(before, first, name)) for name in names)
    rows = [("*before*", "", "", kl, score, "", "", length, repeated)]
    cases = [(x.name, k, f"{m.best_rate(x):g}", m.compared[x.name, k])
             for x in OBJECTIVES for k in x.supports]  # fmt: skip
    cases.append((RATIO.name, 20, f"{HIGH_RATE:g}", m.high_rate))
    for name, k, rate, results in cases:
        kl, score, length, repeated = (spread(by_seed(results, last, name)) for name in names)
        mass = by_seed(results, last, "student_mass")
        bias = [x / math.e for x in by_seed(results, last, "teacher_mass")]
        has_support = name not in (FULL.name, RATIO.name, "policy gradient")
        on_support = (spread(mass), spread(bias)) if has_support else ("", "")
        rows.append((name, str(k) * has_support, rate, kl, score, *on_support, length, repeated))
    rows.append(("*teacher*", "", "", "0", spread(by_seed(before, last, "eval_teacher_score")),
                 "", "", "", ""))  # fmt: skip
    return markdown_table(header, rows)


def drift_table(m: Measured) -> str:
    """The mass on S under two teachers that the student cannot tell apart."""
    header = ("temperature", "K", "objective", "mass on S, first steps", "last steps",
              "reverse KL on its samples, before", "after")  # fmt: skip
    rows = []
    for (name, k, temperature), results in m.drifts.items():
        mass = (spread(by_seed(results, x, "student_mass")) for x in (first, last))
        kl = (spread(by_seed(results, x, "eval_reverse_kl_on_own_samples")) for x in (first, last))
        rows.append((f"{temperature:g}", str(k), name, *mass, *kl))
    return markdown_table(header, rows)


def findings(m: Measured) -> list[Finding]:
    """The effects that the paper, and the design of the losses, lead to expect."""
    found: list[Finding] = []
    for k in SUPPORTS:
        results = m.compared[BIASED.name, k]
        found += _collapses(f"no stop-gradient, K = {k}", results)
        found.append(_changes(f"no stop-gradient, K = {k}: completions grow", results,
                              "eval_completion_length", up=True))  # fmt: skip
        found.append(_changes(f"no stop-gradient, K = {k}: repetition rises", results,
                              "eval_repetition", up=True, asserted=False))  # fmt: skip
        shares = _shares(results)
        near = all(abs(x - 1 / math.e) < 1 - x for x in shares)
        text = f"no stop-gradient, K = {k}: the mass ends closer to Q / e than to Q"
        found.append(Finding(text, near, f"P / Q {spread(shares)}; 1 / e is 0.37", k < 20))
    found += _collapses("log-ratio as loss", m.compared[RATIO.name, 20], has_support=False)
    for text, name in (
        ("completions grow", "completion_length"),
        ("repetition rises", "repetition"),
    ):
        text = f"log-ratio as loss at {HIGH_RATE:g}: {text}"
        found.append(_changes(text, m.high_rate, f"eval_{name}", up=True))
    for objective in OBJECTIVES:
        for k in objective.supports:
            if objective not in (BIASED, RATIO):
                text, results = f"{objective.name}, K = {k}", m.compared[objective.name, k]
                text = text if objective.has_support else objective.name
                found.append(_changes(f"{text}: the reverse KL to the teacher falls", results,
                                      "eval_reverse_kl", up=False, asserted=k >= 3))  # fmt: skip
                # The renormalised loss does not depend on how much mass S holds.
                sees_mass = objective != RENORMALIZED
                found.append(_changes(f"{text}: accuracy rises", results, "eval_score", up=True,
                                      asserted=k >= 3 and sees_mass))  # fmt: skip
    return found + _drifts(m)


def _collapses(text: str, results: list[Lines], has_support: bool = True) -> list[Finding]:
    mass = [_changes(f"{text}: the mass on S falls", results, "student_mass", up=False)]
    return mass * has_support + [
        _changes(f"{text}: accuracy falls", results, "eval_score", up=False),
        _changes(
            f"{text}: the reverse KL to the teacher rises", results, "eval_reverse_kl", up=True
        ),
    ]


def _changes(
    text: str, results: list[Lines], name: str, *, up: bool, asserted: bool = True
) -> Finding:
    before, after = (by_seed(results, x, name) for x in (first, last))
    found = rises(text, before, after) if up else falls(text, before, after)
    return replace(found, asserted=asserted)


def _drifts(m: Measured) -> list[Finding]:
    def ends(objective: Objective, temperature: float, name: str) -> list[float]:
        return by_seed(m.drifts[objective.name, 20, temperature], last, name)

    found = []
    for other in (BUCKET, FULL):
        for name, text in (
            ("student_mass", "more mass on S"),
            ("eval_reverse_kl_on_own_samples", "a lower KL"),
        ):
            pair = [ends(x, 1.0, name) for x in (STOPPED, other)]
            compare = rises if name == "student_mass" else falls
            text = f"two teachers, temperature 1: {other.name} ends with {text} than stop-gradient"
            found.append(compare(f"{text}, K = 20", *pair))
    cold = m.drifts[STOPPED.name, 20, 0.5]
    drop = [abs(a - b) for a, b in zip(*(by_seed(cold, x, "student_mass") for x in (first, last)),
                                       strict=True)]  # fmt: skip
    text = (
        "two teachers, temperature 0.5, K = 20: stop-gradient changes the mass on S by under 0.03"
    )
    return [*found, Finding(text, max(drop) < 0.03, f"it changes by {spread(drop, 3)}")]


def values(m: Measured) -> dict[str, Any]:
    """The values that the text of the page quotes."""
    single = m.compared[STOPPED.name, 1]
    before, after = (spread(by_seed(single, x, "eval_reverse_kl")) for x in (first, last))
    warm = m.drifts[STOPPED.name, 20, 0.7]
    start, end = (fmean(by_seed(warm, x, "student_mass")) for x in (first, last))
    cold = m.drifts[STOPPED.name, 5, 0.5]
    ends = {f"cold_{n}": fmean(by_seed(cold, x, "student_mass")) for n, x in
            (("start", first), ("end", last))}  # fmt: skip
    return (
        ends
        | {"before": before, "after": after, "start": start, "end": end}
        | {
            f"{name.partition(' ')[0].partition('-')[0]}_share": spread(
                _shares(m.compared[name, 3])
            )
            for name in (RENORMALIZED.name, STOPPED.name, BUCKET.name)
        }
    )


def _shares(results: list[Lines]) -> list[float]:
    """P / Q at the end, by seed."""
    student, teacher = (by_seed(results, last, f"{x}_mass") for x in ("student", "teacher"))
    return [p / q for p, q in zip(student, teacher, strict=True)]

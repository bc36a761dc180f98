"""Claim 3: of teachers that are as accurate, the one that grew out of the student teaches it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.paper.adding import PLAIN, RESTATED, Adding, nearest
from benchmarks.paper.figures import band, level, panels, save
from benchmarks.paper.page import Claim, Finding, falls, rises, spread, table
from benchmarks.paper.runs import Laboratory, Line, Run, by_seed, first, last

TRAINED = 60  # batches of SFT that the student has seen
REINFORCED, ALIKE, OTHER = "the student after RLVR", "larger, same format", "larger, other format"
COLORS = {REINFORCED: "tab:blue", ALIKE: "tab:green", OTHER: "tab:red"}
_CHECKPOINTS = {
    "eval_steps": 10, "save_strategy": "steps", "save_steps": 10, "save_only_model": True,
}  # fmt: skip


@dataclass
class Measured:
    """Claim 3's distillations, of each seed, by their teacher; and the teachers' accuracies."""

    lines: dict[str, list[list[Line]]]
    teachers: dict[str, list[float]]


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 3 and report it; the figure goes into the folder."""
    m = measure(lab, seeds)
    path = draw(m, folder / "paper_adapted_teacher.png")
    return Claim(3, [scores_table(m)], {}, path, findings(m))


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Make teachers of nearly the same accuracy, and distil the student from each."""
    adding = Adding(lab)
    students = {seed: adding.half_trained(seed, steps=TRAINED) for seed in seeds}
    larger = {
        (name, seed): adding.sft(f"large-{styles[0]}", seed, styles, large=True, **_CHECKPOINTS)
        for name, styles in ((ALIKE, PLAIN), (OTHER, RESTATED)) for seed in seeds
    }  # fmt: skip
    models = [*students.values(), *larger.values()]
    results = lab.measure(models, "claim 3, models")
    trained = {run.folder: lines for run, lines in zip(models, results, strict=True)}
    reinforced = {seed: adding.reinforced(students[seed], seed) for seed in seeds}
    results = lab.measure(list(reinforced.values()), "claim 3, RLVR")
    scores = dict(zip(seeds, by_seed(results, last, "eval_score"), strict=True))
    teachers = {REINFORCED: list(scores.values())}
    runs: dict[str, list[Run]] = {
        REINFORCED: [adding.distill("from-reinforced", students[s], reinforced[s], s)
                     for s in seeds]
    }  # fmt: skip
    for name in (ALIKE, OTHER):
        pairs = [nearest(trained[larger[name, s].folder], scores[s]) for s in seeds]
        teachers[name] = [score for _, score in pairs]
        runs[name] = [
            adding.distill(f"from-{name}".replace(", ", "-").replace(" ", "-"), students[s],
                           larger[name, s], s, step)
            for s, (step, _) in zip(seeds, pairs, strict=True)
        ]  # fmt: skip
    lines = {name: lab.measure(own, "claim 3") for name, own in runs.items()}
    return Measured(lines, teachers)


def scores_table(m: Measured) -> str:
    """What each teacher is like to the student, and what that reaches."""
    header = ("teacher", "its accuracy", "overlap of the top 10, before", "after",
              "reverse KL on own samples, before", "after", "student's accuracy, before",
              "after")  # fmt: skip
    names = ("eval_overlap_on_own_samples", "eval_reverse_kl_on_own_samples", "eval_score")
    return table(header, (
        (name, spread(m.teachers[name]),
         *(spread(by_seed(results, x, figure)) for figure in names for x in (first, last)))
        for name, results in m.lines.items()
    ))  # fmt: skip


def findings(m: Measured) -> list[Finding]:
    """The paper's expectations."""
    own, other = m.lines[REINFORCED], m.lines[OTHER]
    apart_by = [abs(a - b) for a, b in zip(m.teachers[REINFORCED], m.teachers[OTHER], strict=True)]
    before, after = (by_seed(own, x, "eval_score") for x in (first, last))
    return [
        Finding("the two teachers are as accurate, to 0.05", max(apart_by) <= 0.05,
                f"{spread(apart_by, 3)} apart"),
        rises("the student's top 10 overlap more with its RLVR-adapted self's than with the "
              "other teacher's",
              by_seed(other, first, "eval_overlap_on_own_samples"),
              by_seed(own, first, "eval_overlap_on_own_samples")),
        rises("from its RLVR-adapted self the student gets better", before, after),
        falls("and better than from the other teacher", after,
              by_seed(other, last, "eval_score")),
        rises("a larger teacher of the same format is no obstacle", before,
              by_seed(m.lines[ALIKE], last, "eval_score")),
    ]  # fmt: skip


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure, (score, overlap, kl) = panels(1, 3, (
        "accuracy of the student", "overlap of the top 10 (own samples)",
        "reverse KL to the teacher (own samples)",
    ))  # fmt: skip
    for name, results in m.lines.items():
        band(score, results, "eval_score", COLORS[name], f"teacher: {name}")
        band(overlap, results, "eval_overlap_on_own_samples", COLORS[name], None)
        band(kl, results, "eval_reverse_kl_on_own_samples", COLORS[name], None)
    level(score, fmean(m.teachers[REINFORCED]), "the teachers")
    score.set(ylim=(0, 1.05), xlabel="step")
    overlap.set(ylim=(0, 1), xlabel="step")
    kl.set(yscale="log", xlabel="step")
    score.legend(fontsize=7, frameon=False)
    return save(figure, path)

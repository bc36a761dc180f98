"""Claim 3: of equally accurate teachers, the student after RLVR is the better one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import markdown_table
from benchmarks.paper.adding import PLAIN, RESTATED, Adding, nearest
from benchmarks.paper.figures import band, level, panels, save
from benchmarks.paper.page import Claim, Finding, falls, rises, spread
from benchmarks.paper.runs import Laboratory, Line, Run, by_seed, first, last

SFT_STEPS = 60  # of the student
REINFORCED, SAME_FORMAT, OTHER_FORMAT = (
    "the student after RLVR",
    "larger, same format",
    "larger, other format",
)
COLORS = {REINFORCED: "tab:blue", SAME_FORMAT: "tab:green", OTHER_FORMAT: "tab:red"}
_CHECKPOINTS = {
    "eval_steps": 10, "save_strategy": "steps", "save_steps": 10, "save_only_model": True,
}  # fmt: skip


@dataclass
class Measured:
    """The results of claim 3, by teacher, with one entry per seed."""

    lines: dict[str, list[list[Line]]]  # of the distillations
    teachers: dict[str, list[float]]  # accuracies


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 3; its figure is written to the folder."""
    m = measure(lab, seeds)
    path = draw(m, folder / "paper_adapted_teacher.png")
    return Claim(3, [scores_table(m)], {}, path, findings(m))


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Train teachers of nearly the same accuracy, and distil the student from each."""
    adding = Adding(lab)
    students = {seed: adding.half_trained(seed, steps=SFT_STEPS) for seed in seeds}
    larger = {
        (name, seed): adding.sft(f"large-{styles[0]}", seed, styles, large=True, **_CHECKPOINTS)
        for name, styles in ((SAME_FORMAT, PLAIN), (OTHER_FORMAT, RESTATED)) for seed in seeds
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
    for name in (SAME_FORMAT, OTHER_FORMAT):
        pairs = [nearest(trained[larger[name, s].folder], scores[s]) for s in seeds]
        teachers[name] = [score for _, score in pairs]
        runs[name] = [
            adding.distill(f"from-{name}".replace(", ", "-").replace(" ", "-"), students[s],
                           larger[name, s], s, step)
            for s, (step, _) in zip(seeds, pairs, strict=True)
        ]  # fmt: skip
    lines = {name: lab.measure(group, "claim 3") for name, group in runs.items()}
    return Measured(lines, teachers)


def scores_table(m: Measured) -> str:
    """Each teacher's accuracy and distance to the student, and the student's results."""
    header = ("teacher", "its accuracy", "overlap of the top 10, before", "after",
              "reverse KL on own samples, before", "after", "student's accuracy, before",
              "after")  # fmt: skip
    names = ("eval_overlap_on_own_samples", "eval_reverse_kl_on_own_samples", "eval_score")
    return markdown_table(header, (
        (name, spread(m.teachers[name]),
         *(spread(by_seed(results, x, metric)) for metric in names for x in (first, last)))
        for name, results in m.lines.items()
    ))  # fmt: skip


def findings(m: Measured) -> list[Finding]:
    """The effects that the paper leads to expect."""
    adapted, other = m.lines[REINFORCED], m.lines[OTHER_FORMAT]
    pairs = zip(m.teachers[REINFORCED], m.teachers[OTHER_FORMAT], strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    before, after = (by_seed(adapted, x, "eval_score") for x in (first, last))
    return [
        Finding("the accuracies of the two teachers differ by at most 0.05", max(gaps) <= 0.05,
                f"{spread(gaps, 3)} apart"),
        rises("the student's top 10 overlap more with its RLVR-adapted self's than with the "
              "other teacher's",
              by_seed(other, first, "eval_overlap_on_own_samples"),
              by_seed(adapted, first, "eval_overlap_on_own_samples")),
        rises("the student's accuracy rises with its RLVR-adapted self as teacher", before, after),
        falls("it ends higher than with the other teacher", after,
              by_seed(other, last, "eval_score")),
        rises("it rises with a larger teacher of the same format too", before,
              by_seed(m.lines[SAME_FORMAT], last, "eval_score")),
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
    return save(figure, path, legends=[score])

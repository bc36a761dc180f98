"""Claim 2: a teacher is less accurate when it continues the student's prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import markdown_table
from benchmarks.paper.adding import Adding
from benchmarks.paper.figures import level, panels, points, save
from benchmarks.paper.page import Claim, Finding, falls, spread
from benchmarks.paper.runs import Laboratory, Line, by_seed, last

SFT_STEPS = (30, 45, 60)  # of the students


@dataclass
class Measured:
    """The results of claim 2, by the student's steps of SFT, with one entry per seed."""

    probes: dict[int, list[list[Line]]]

    def values(self, steps: int, metric: str) -> list[float]:
        """Return a metric of the students with these steps, by seed."""
        return by_seed(self.probes[steps], last, f"eval_{metric}")


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 2; its figure is written to the folder."""
    m = measure(lab, seeds)
    return Claim(2, [scores_table(m)], {}, draw(m, folder / "paper_mismatch.png"), findings(m))


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Train teachers and students, and let the teachers continue the students' prefixes."""
    adding = Adding(lab)
    teachers = [adding.teacher(seed) for seed in seeds]
    students = {n: [adding.half_trained(seed, steps=n) for seed in seeds] for n in SFT_STEPS}
    lab.measure([*teachers, *(x for runs in students.values() for x in runs)], "claim 2, models")
    probes = {
        n: [adding.probe(*x) for x in zip(runs, teachers, seeds, strict=True)]
        for n, runs in students.items()
    }
    return Measured({n: lab.measure(runs, "claim 2") for n, runs in probes.items()})


def scores_table(m: Measured) -> str:
    """Accuracies, and the numbers of answers that change."""
    header = ("batches of SFT", "student", "teacher alone", "teacher on the student's prefixes",
              "teacher's answers: right to wrong", "wrong to right",
              "student's answers: right to wrong", "wrong to right")  # fmt: skip
    turns = ("right_to_wrong", "wrong_to_right")
    names = ["score", "teacher_score", "probe_score"]
    counts = [*(f"probe_teacher_{x}" for x in turns), *(f"probe_{x}" for x in turns)]
    return markdown_table(header, (
        (str(n), *(spread(m.values(n, x)) for x in names),
         *(spread(m.values(n, x), 0) for x in counts))
        for n in SFT_STEPS
    ))  # fmt: skip


def findings(m: Measured) -> list[Finding]:
    """The effects that the paper leads to expect."""
    found = []
    for n in SFT_STEPS:
        text = f"student of {n} batches"
        alone, continued = m.values(n, "teacher_score"), m.values(n, "probe_score")
        lost, won = (m.values(n, f"probe_teacher_{x}") for x in
                     ("right_to_wrong", "wrong_to_right"))  # fmt: skip
        found += [
            falls(f"{text}: the teacher is less accurate on the student's prefixes", alone,
                  continued),
            falls(f"{text}: the teacher's answers change to wrong more often than to right",
                  lost, won),
        ]  # fmt: skip
    return found


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure, (score, changed) = panels(1, 2, (
        "accuracy, by the accuracy of the student", "the teacher's answers that change",
    ))  # fmt: skip
    positions = [fmean(m.values(n, "score")) for n in SFT_STEPS]
    for name, text, color in (
        ("probe_score", "teacher on the student's prefixes", "tab:red"),
        ("score", "student", "tab:blue"),
    ):
        points(score, positions, [m.values(n, name) for n in SFT_STEPS], color, text)
    level(score, fmean(m.values(SFT_STEPS[0], "teacher_score")), "teacher alone")
    score.set(ylim=(0, 1.05), xlabel="student's accuracy")
    for name, text, color in (
        ("right_to_wrong", "right to wrong", "tab:red"),
        ("wrong_to_right", "wrong to right", "tab:green"),
    ):
        values = [m.values(n, f"probe_teacher_{name}") for n in SFT_STEPS]
        points(changed, positions, values, color, text)
    changed.set(xlabel="student's accuracy", ylabel="of 512", ylim=(0, None))
    return save(figure, path, legends=[score, changed])

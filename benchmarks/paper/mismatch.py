"""Claim 2: a teacher that goes on from a student's prefixes loses what it knows alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.paper.adding import Adding
from benchmarks.paper.figures import level, panels, points, save
from benchmarks.paper.page import Claim, Finding, falls, spread, table
from benchmarks.paper.runs import Laboratory, Line, by_seed, last

TRAINED = (30, 45, 60)  # batches of SFT that the students have seen


@dataclass
class Measured:
    """The evaluations of claim 2, of each seed, by how far the student was trained."""

    probes: dict[int, list[list[Line]]]

    def figure(self, steps: int, name: str) -> list[float]:
        """A figure of each seed."""
        return by_seed(self.probes[steps], last, f"eval_{name}")


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 2 and report it; the figure goes into the folder."""
    m = measure(lab, seeds)
    return Claim(2, [scores_table(m)], {}, draw(m, folder / "paper_mismatch.png"), findings(m))


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Train teachers and students, and let the ones go on from the others' prefixes."""
    adding = Adding(lab)
    teachers = [adding.teacher(seed) for seed in seeds]
    students = {n: [adding.half_trained(seed, steps=n) for seed in seeds] for n in TRAINED}
    lab.measure([*teachers, *(x for own in students.values() for x in own)], "claim 2, models")
    probes = {
        n: [adding.probe(*x) for x in zip(own, teachers, seeds, strict=True)]
        for n, own in students.items()
    }
    return Measured({n: lab.measure(own, "claim 2") for n, own in probes.items()})


def scores_table(m: Measured) -> str:
    """Accuracies, and the answers that turn."""
    header = ("batches of SFT", "student", "teacher alone", "teacher on the student's prefixes",
              "teacher's answers: right to wrong", "wrong to right",
              "student's answers: right to wrong", "wrong to right")  # fmt: skip
    turns = ("right_to_wrong", "wrong_to_right")
    names = ["score", "teacher_score", "probe_score"]
    counts = [*(f"probe_teacher_{x}" for x in turns), *(f"probe_{x}" for x in turns)]
    return table(header, (
        (str(n), *(spread(m.figure(n, x)) for x in names),
         *(spread(m.figure(n, x), 0) for x in counts))
        for n in TRAINED
    ))  # fmt: skip


def findings(m: Measured) -> list[Finding]:
    """The paper's expectations."""
    found = []
    for n in TRAINED:
        text = f"student of {n} batches"
        alone, continued = m.figure(n, "teacher_score"), m.figure(n, "probe_score")
        lost, won = (m.figure(n, f"probe_teacher_{x}") for x in
                     ("right_to_wrong", "wrong_to_right"))  # fmt: skip
        found += [
            falls(f"{text}: the teacher is less accurate on its prefixes than alone", alone,
                  continued),
            falls(f"{text}: more of the teacher's answers turn from right to wrong than back",
                  lost, won),
        ]  # fmt: skip
    return found


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure, (score, turned) = panels(1, 2, (
        "accuracy, by the accuracy of the student", "the teacher's answers that turn",
    ))  # fmt: skip
    places = [fmean(m.figure(n, "score")) for n in TRAINED]
    for name, text, color in (
        ("probe_score", "teacher on the student's prefixes", "tab:red"),
        ("score", "student", "tab:blue"),
    ):
        points(score, places, [m.figure(n, name) for n in TRAINED], color, text)
    level(score, fmean(m.figure(TRAINED[0], "teacher_score")), "teacher alone")
    score.set(ylim=(0, 1.05), xlabel="student's accuracy")
    for name, text, color in (
        ("right_to_wrong", "right to wrong", "tab:red"),
        ("wrong_to_right", "wrong to right", "tab:green"),
    ):
        values = [m.figure(n, f"probe_teacher_{name}") for n in TRAINED]
        points(turned, places, values, color, text)
    turned.set(xlabel="student's accuracy", ylabel="of 512", ylim=(0, None))
    for axis in (score, turned):
        axis.legend(fontsize=7, frameon=False)
    return save(figure, path)

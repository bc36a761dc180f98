"""Claim 4: a student with a different format needs SFT before on-policy distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.markdown import markdown_table
from benchmarks.paper.adding import RESTATED, Adding
from benchmarks.paper.figures import band, level, panels, save
from benchmarks.paper.page import Claim, Finding, falls, rises, spread
from benchmarks.paper.runs import Laboratory, Line, Run, by_seed, first, last
from benchmarks.paper.sums import DIGITS
from opd_trainer.build import load
from opd_trainer.models.load import eval_mode, load_model
from opd_trainer.models.teacher import on_completions, token_ids

STUDENT_STEPS = 60  # of the student's own SFT, in the other format
SFT_STEPS, STEPS = 20, 60  # of the SFT on the teacher's completions, and in total
LENGTH = DIGITS + 1  # of the teacher's completions, with EOS
BEFORE, DIRECT, SFT, BOTH = "before", "OPD alone", "SFT alone", "SFT, then OPD"
COLORS = {DIRECT: "tab:red", SFT: "tab:orange", BOTH: "tab:blue"}


@dataclass
class Measured:
    """The results of claim 4, with one entry per seed."""

    lines: dict[str, list[list[Line]]]
    trace_nll: dict[str, list[float]]  # nats per token of the teacher's own completions


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 4; its figure is written to the folder."""
    m = measure(lab, seeds)
    path = draw(m, folder / "paper_foreign_habits.png")
    before, after = (
        spread(by_seed(m.lines[DIRECT], x, "eval_reverse_kl_on_own_samples")) for x in (first, last)
    )
    values = {"before": before, "kl": after}
    return Claim(4, [scores_table(m)], values, path, findings(m))


def measure(lab: Laboratory, seeds: Sequence[int]) -> Measured:
    """Distil a student that writes in another format, directly and after SFT."""
    adding = Adding(lab)
    teachers = {seed: adding.teacher(seed) for seed in seeds}
    students = {seed: adding.half_trained(seed, RESTATED, steps=STUDENT_STEPS) for seed in seeds}
    lab.measure([*teachers.values(), *students.values()], "claim 4, models")
    stages = {
        SFT: [adding.imitate(students[s], teachers[s], s, SFT_STEPS) for s in seeds],
        DIRECT: [adding.distill("direct", students[s], teachers[s], s, max_steps=STEPS)
                 for s in seeds],
    }  # fmt: skip
    lines = {name: lab.measure(runs, "claim 4") for name, runs in stages.items()}
    stages[BOTH] = [
        adding.distill("after-sft", start, teachers[s], s, max_steps=STEPS - SFT_STEPS)
        for s, start in zip(seeds, stages[SFT], strict=True)
    ]
    lines[BOTH] = lab.measure(stages[BOTH], "claim 4")
    models = {BEFORE: list(students.values()), **stages}
    by_run = [
        trace_nll_of([runs[number].model for runs in models.values()], run)
        for number, run in enumerate(stages[DIRECT])
    ]
    columns = zip(*by_run, strict=True)
    return Measured(lines, {x: list(nll) for x, nll in zip(models, columns, strict=True)})


@torch.no_grad()
def trace_nll_of(models: Sequence[str], distillation: Run) -> list[float]:
    """Return each model's nats per token on completions of the distillation's teacher."""
    _, evaluation, _ = load(distillation.config())
    traces = evaluation.complete_by_teachers(evaluation.prompts, 0)
    ids, found = token_ids(traces, torch.device("cpu")), []
    for model in models:
        student = load_model(model, "float32")
        with eval_mode(student):
            log_probs = on_completions(student, traces, 1.0, lambda x: x.log_prob(ids))
        found.append(-float(log_probs.mean()))
    return found


def scores_table(m: Measured) -> str:
    """Accuracy, length, and likelihood of the teacher's completions, by run."""
    header = ("", "accuracy", "letters", "NLL of the teacher's completions")
    names = ("eval_score", "eval_completion_length")
    before = [spread(by_seed(m.lines[DIRECT], first, name)) for name in names]
    rows = [(BEFORE, *before, spread(m.trace_nll[BEFORE]))]
    for name in COLORS:
        after = [spread(by_seed(m.lines[name], last, x)) for x in names]
        rows.append((name, *after, spread(m.trace_nll[name])))
    teacher = spread(by_seed(m.lines[DIRECT], last, "eval_teacher_score"))
    return markdown_table(header, [*rows, ("*teacher*", teacher, f"{LENGTH:.2f}", "")])


def findings(m: Measured) -> list[Finding]:
    """The effects that the paper leads to expect."""

    def ends(name: str, metric: str) -> list[float]:
        return by_seed(m.lines[name], last, metric)

    before = by_seed(m.lines[DIRECT], first, "eval_score")
    lengths = ends(BOTH, "eval_completion_length")
    return [
        falls("OPD alone: the accuracy falls", before, ends(DIRECT, "eval_score")),
        rises("SFT first: the accuracy ends above that of OPD alone", ends(DIRECT, "eval_score"),
              ends(BOTH, "eval_score")),
        rises("OPD after SFT ends above SFT alone", ends(SFT, "eval_score"),
              ends(BOTH, "eval_score")),
        falls("SFT first: the teacher's completions are more likely than after OPD alone",
              m.trace_nll[DIRECT], m.trace_nll[BOTH]),
        Finding("SFT first: the length is within half a letter of the teacher's",
                max(abs(x - LENGTH) for x in lengths) < 0.5,
                f"{spread(lengths)} letters; the teacher has {LENGTH}"),
    ]  # fmt: skip


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure, (score, length, nll) = panels(1, 3, (
        "accuracy", "length of completions", "NLL of the teacher's completions",
    ))  # fmt: skip
    for name in (DIRECT, BOTH):
        shift = SFT_STEPS if name == BOTH else 0
        band(score, m.lines[name], "eval_score", COLORS[name], name, shift=shift)
        band(length, m.lines[name], "eval_completion_length", COLORS[name], name, shift=shift)
    level(score, fmean(by_seed(m.lines[DIRECT], last, "eval_teacher_score")), "teacher")
    level(length, LENGTH, "teacher")
    for position, (name, values) in enumerate(m.trace_nll.items()):
        nll.bar(position, fmean(values), color=COLORS.get(name, "0.6"))
        nll.plot([position] * len(values), values, "k.", ms=4)
    nll.set_xticks(range(len(m.trace_nll)), list(m.trace_nll), fontsize=7)
    score.set(ylim=(0, 1.05), xlabel="step, including those of SFT")
    length.set(ylim=(0, None), xlabel="step, including those of SFT")
    return save(figure, path, legends=[score])

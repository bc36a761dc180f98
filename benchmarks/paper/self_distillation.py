"""Claim 5: self-distillation internalises a shared rule, and averages rules that differ.

With several teachers of the same prompt, the optimum of reverse KL is their normalised geometric
mean; its reverse KL to the teachers is -log of its normaliser Z. The optimum of forward KL is the
arithmetic mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.markdown import markdown_table
from benchmarks.paper.figures import band, level, panels, points, save
from benchmarks.paper.models import write_random_model
from benchmarks.paper.page import Claim, Finding, falls, is_below, rises, spread
from benchmarks.paper.runs import Laboratory, Line, Run, by_seed, first, last
from benchmarks.paper.tasks import RULES, instructed, with_rules
from opd_trainer.build import load
from opd_trainer.models.load import eval_mode, load_model
from opd_trainer.models.teacher import on_completions

SHARED_RULE = 3
DEMO = "shared rule, SmolLM2-135M, one seed"
# The demo's recipe evaluates only after its run; here the last step does.
AT_THE_END = {"eval_strategy": "steps", "eval_steps": 14}
QUIET = {"preflight": False, "report_to": "none", "disable_tqdm": True}
_DATA_SEED = 100
SHARED, REVERSE, FORWARD = "shared rule", "own rules, reverse KL", "own rules, forward KL"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # data, and changes of keys
    SHARED: ("shared", {}),
    REVERSE: ("own", {}),
    FORWARD: ("own", {"objective": "forward_kl"}),
}


@dataclass(frozen=True)
class Distances:
    """Means over the tokens of a student's own samples: total variations in 0 to 1, KL in nats."""

    to_geometric: float
    to_arithmetic: float
    reverse_kl: float  # of the student to its teachers
    residual: float  # -log Z, the lower bound of reverse_kl


@dataclass
class Measured:
    """The results of claim 5, with one entry per seed."""

    lines: dict[str, list[list[Line]]]  # by kind
    distances: dict[str, list[Distances]]  # by kind, for those with several teachers per prompt
    demo: list[Line] | None  # of SmolLM2-135M


def claim(lab: Laboratory, seeds: Sequence[int], folder: Path) -> Claim:
    """Run claim 5; its figure is written to the folder."""
    m = measure(lab, seeds, with_demo=True)
    path = draw(m, folder / "paper_self_distillation.png")
    return Claim(5, [scores_table(m), distances_table(m)], {}, path, findings(m))


def base(lab: Laboratory, seed: int, **changes: Any) -> Run:
    """A model that follows the rule in its system message."""
    start = write_random_model(lab.root / "random" / f"chat-{seed}", seed, chat=True)
    rows = lab.data(f"rules-{seed}", partial(instructed, 9600, _DATA_SEED + seed))
    keys = {"model": start, "train_data": rows, "seed": seed} | changes
    return Run(lab.root / "rules" / f"base-{seed}", "sft", "rules_sft.yaml", keys)


def distillation(lab: Laboratory, kind: str, start: Run, seed: int, **changes: Any) -> Run:
    """The self-distillation of that model from rules that only the teacher sees."""
    data, of_kind = KINDS[kind]
    rules = (SHARED_RULE,) if data == "shared" else RULES
    keys = {"model": start.model, "seed": seed} | of_kind | changes
    for key, count, name in (("train_data", 11520, "prompts"), ("eval_data", 192, "held-out")):
        keys[key] = lab.data(f"rules-{data}-{name}", partial(with_rules, count, rules))
    folder = lab.root / "rules" / f"{kind}-{seed}".replace(",", "").replace(" ", "-")
    return Run(folder, "distill", "rules_distill.yaml", keys, (start,))


def measure(
    lab: Laboratory,
    seeds: Sequence[int],
    kinds: Sequence[str] = tuple(KINDS),
    steps: int | None = None,
    base_steps: int | None = None,
    with_demo: bool = False,
) -> Measured:
    """Train, distil and compare.

    Args:
        steps: steps of distillation, by default those of the recipe.
        base_steps: steps of SFT, by default those of the recipe.
        with_demo: also run the demo's recipe on SmolLM2-135M.
    """
    sft = {} if base_steps is None else {"max_steps": base_steps}
    distill = {} if steps is None else {"max_steps": steps, "eval_steps": steps}
    bases = {seed: base(lab, seed, **sft) for seed in seeds}
    lab.measure(list(bases.values()), "claim 5, models")
    runs = {
        kind: [distillation(lab, kind, bases[seed], seed, **distill) for seed in seeds]
        for kind in kinds
    }
    demo = Run(lab.root / "smollm2", "distill", "../demo.yaml", QUIET | AT_THE_END)
    # The demo takes longest and starts first.
    every_run = [demo] * with_demo + [run for group in runs.values() for run in group]
    results = iter(lab.measure(every_run, "claim 5"))
    demo_lines = next(results) if with_demo else None
    lines = {kind: [next(results) for _ in group] for kind, group in runs.items()}
    averaged = [kind for kind in kinds if kind != SHARED]
    measured = {kind: [distances(run) for run in runs[kind]] for kind in averaged}
    return Measured(lines, measured, demo_lines)


@torch.no_grad()
def distances(run: Run) -> Distances:
    """Return a student's distances to the means of its teachers, on its own samples."""
    config = run.config()
    _, evaluation, _ = load(config)
    student = load_model(run.model, "float32")
    groups: dict[str, list[Any]] = {}
    for prompt in evaluation.prompts:
        groups.setdefault(prompt.text, []).append(prompt)
    samples = evaluation.sampler.sample(student, [x[0] for x in groups.values()], config.seed)
    teacher = evaluation.local[""]
    log_q = torch.stack([
        teacher.logits(
            [replace(c, prompt=groups[c.prompt.text][i]) for c in samples], config.temperature
        ).materialize().log_softmax(-1)
        for i in range(len(RULES))
    ])  # fmt: skip
    with eval_mode(student):
        log_p = on_completions(student, samples, config.temperature, lambda x: x.materialize())
    return compare(log_p.log_softmax(-1), log_q)


def compare(log_p: Tensor, log_q: Tensor) -> Distances:
    """Compare a student's log-probabilities [N, V] with those of M teachers [M, N, V]."""
    log_geometric, log_z = log_q.mean(0), log_q.mean(0).logsumexp(-1)
    p, geometric = log_p.exp(), (log_geometric - log_z[:, None]).exp()
    kl = (p * (log_p - log_q)).sum(-1)
    return Distances(
        to_geometric=float((p - geometric).abs().sum(-1).mean() / 2),
        to_arithmetic=float((p - log_q.exp().mean(0)).abs().sum(-1).mean() / 2),
        reverse_kl=float(kl.mean()),
        residual=float(-log_z.mean()),
    )


def scores_table(m: Measured) -> str:
    """Accuracy and divergence by kind."""
    header = ("privileged information", "accuracy before", "after", "teacher",
              "reverse KL to the teacher, before", "after")  # fmt: skip
    rows, kinds = [], m.lines | ({} if m.demo is None else {DEMO: [m.demo]})
    for kind, results in kinds.items():
        score = (spread(by_seed(results, x, "eval_score")) for x in (first, last))
        teacher = spread(by_seed(results, last, "eval_teacher_score"))
        kl = (spread(by_seed(results, x, "eval_reverse_kl")) for x in (first, last))
        rows.append((kind, *score, teacher, *kl))
    return markdown_table(header, rows)


def distances_table(m: Measured) -> str:
    """Distances to the means of the teachers, by kind."""
    header = ("privileged information", "total variation to the geometric mean",
              "to the arithmetic mean", "reverse KL to the teachers", "-log Z")  # fmt: skip
    rows = []
    for kind, group in m.distances.items():
        names = ("to_geometric", "to_arithmetic", "reverse_kl", "residual")
        rows.append((kind, *(spread([getattr(x, name) for x in group], 3) for name in names)))
    return markdown_table(header, rows)


def findings(m: Measured) -> list[Finding]:
    """The effects that the paper leads to expect, and the closed forms."""
    shared, reverse = m.lines[SHARED], m.lines[REVERSE]
    gained, gained_apart = _gains(shared), _gains(reverse)
    kl = [by_seed(shared, x, "eval_reverse_kl") for x in (first, last)]
    return [
        Finding(f"{SHARED}: at least nine tenths of the way to the teacher's accuracy",
                min(gained) >= 0.9, f"{spread(gained)} of the way"),
        falls(f"{SHARED}: the reverse KL to the teacher falls", *kl),
        Finding(f"{REVERSE}: at most a tenth of that way", max(gained_apart) <= 0.1,
                f"{spread(gained_apart)} of the way"),
        rises(f"{REVERSE}: more divergence remains than with a {SHARED}", kl[1],
              by_seed(reverse, last, "eval_reverse_kl")),
        *closed_forms(m.distances),
        *(_demo_findings(m.demo) if m.demo else []),
    ]  # fmt: skip


def _gains(results: Sequence[list[Line]]) -> list[float]:
    """The share of the way from the student's first accuracy to the teacher's, by seed."""
    before, after = (by_seed(results, x, "eval_score") for x in (first, last))
    teacher = by_seed(results, last, "eval_teacher_score")
    return [(a - b) / (t - b) for b, a, t in zip(before, after, teacher, strict=True)]


def _demo_findings(lines: list[Line]) -> list[Finding]:
    """The demo has one seed."""
    kl, score = ([[x(lines, name)] for x in (first, last)]
                 for name in ("eval_reverse_kl", "eval_score"))  # fmt: skip
    return [
        falls(f"{DEMO}: the reverse KL to the teacher falls", *kl),
        rises(f"{DEMO}: the rule is internalised", *score),
    ]


def closed_forms(by_kind: dict[str, list[Distances]]) -> list[Finding]:
    """Students end at the means that theory predicts, and -log Z of the divergence remains."""
    reverse, forward = by_kind[REVERSE], by_kind[FORWARD]
    near = [[x.to_geometric for x in reverse], [x.to_arithmetic for x in reverse]]
    other = [[x.to_arithmetic for x in forward], [x.to_geometric for x in forward]]
    excess = [x.reverse_kl / x.residual - 1 for x in reverse]
    return [
        rises(f"{REVERSE}: closer to the geometric mean than to the arithmetic one", *near),
        rises(f"{FORWARD}: closer to the arithmetic mean than to the geometric one", *other),
        Finding(f"{REVERSE}: ends within 0.05 of the geometric mean in total variation",
                max(near[0]) < 0.05, spread(near[0], 3)),
        Finding(f"{REVERSE}: the remaining divergence exceeds -log Z by under 5 %",
                is_below([-0.001], excess) and max(excess) < 0.05, f"{spread(excess, 3)} more"),
    ]  # fmt: skip


def draw(m: Measured, path: Path) -> Path:
    """Write the figure; returns its path."""
    colors = dict(zip(KINDS, ("tab:blue", "tab:red", "tab:orange"), strict=True))
    figure, (score, kl, mean) = panels(1, 3, (
        "accuracy without the rule", "reverse KL to the teacher (own samples)",
        "total variation to the mean of the teachers",
    ))  # fmt: skip
    for kind, results in m.lines.items():
        band(score, results, "eval_score", colors[kind], kind)
        band(kl, results, "eval_reverse_kl_on_own_samples", colors[kind], None)
    band(score, m.lines[SHARED], "eval_teacher_score", "0.4", "teacher with it", ":")
    residual = fmean(x.residual for x in m.distances[REVERSE])
    level(kl, residual, "-log Z of the geometric mean", below=True)
    for kind, group in m.distances.items():
        values = [[x.to_geometric for x in group], [x.to_arithmetic for x in group]]
        points(mean, (0, 1), values, colors[kind], kind)
    mean.set_xticks((0, 1), ("geometric", "arithmetic"))
    mean.set(xlim=(-0.4, 1.4), ylim=(0, None))
    score.set(xlabel="step", ylim=(0, 1))
    kl.set(xlabel="step", ylim=(0, None))
    return save(figure, path, legends=[score, mean])

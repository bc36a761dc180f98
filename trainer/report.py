"""What a run leaves to look at: its curves, and the table before and after on held-out prompts."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from trainer.checkpoint import METRICS
from trainer.evaluation import SAMPLES

PANELS = {
    "loss per token (nats)": ["loss"],
    "gradient norm": ["grad_norm"],
    "probability of the support": ["student_mass", "teacher_mass"],
    "top-K overlap with the teacher": ["overlap", "eval_overlap"],
    "entropy (nats)": ["student_entropy", "teacher_entropy"],
    "completion length (tokens)": ["completion_length", "eval_completion_length"],
    "held-out reverse KL (nats per token)": ["eval_reverse_kl", "eval_reverse_kl_on_own_samples"],
    "held-out score": ["eval_score"],
}


def plot_curves(run: Path) -> None:
    """Plot the logged figures against the step, as curves.png."""
    log = _read(run / METRICS)
    panels = [
        t for t, names in PANELS.items() if any(name in line for name in names for line in log)
    ]
    figure = Figure(figsize=(10, 1.4 * len(panels)), dpi=120, layout="tight")
    for position, title in enumerate(panels, start=1):
        axis = figure.add_subplot((len(panels) + 1) // 2, 2, position, title=title, xlabel="step")
        for name in PANELS[title]:
            points = [(line["step"], line[name]) for line in log if name in line]
            label = name.replace("eval", "held-out").replace("_", " ")
            axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(run / "curves.png")


def before_after(run: Path, shown: int = 3) -> str:
    """Markdown: the first and last held-out figures and some completions; also as report.md."""
    evaluations = [line for line in _read(run / METRICS) if "eval_reverse_kl" in line]
    first, last = evaluations[0], evaluations[-1]
    lines = ["| held-out | before | after |", "|---|---|---|"]
    for name in [name for name in last if name.startswith("eval_")]:
        title = name.removeprefix("eval_").replace("_", " ")
        lines.append(f"| {title} | {first[name]:.3f} | {last[name]:.3f} |")
    samples = [_read(run / SAMPLES.format(x["step"]))[:shown] for x in (first, last)]
    for before, after in zip(*samples, strict=True):
        lines += ["", f"**{before['prompt']}**"]
        texts = before["student"], after["student"], after["teacher"]
        for name, text in zip(("before", "after", "teacher"), texts, strict=True):
            lines.append(f"- {name}: {' '.join(text.split())[:240]}")
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

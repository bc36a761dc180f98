"""What a run leaves to look at: its curves, and the table before and after on held-out prompts."""

import json
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {
    "loss per token (nats)": ("loss",),
    "probability of the support": ("student_mass", "teacher_mass"),
    "top-K overlap": ("overlap", "eval_overlap"),
    "entropy (nats)": ("student_entropy", "teacher_entropy"),
    "completion length (tokens)": ("completion_length", "eval_completion_length"),
    "held-out reverse KL (nats per token)": ("eval_kl", "eval_kl_own_samples"),
    "held-out score": ("eval_score",),
    "gradient norm": ("grad_norm",),
}
ROWS = {
    "eval_kl": "reverse KL to the teacher, on its completions (nats per token)",
    "eval_kl_per_completion": "the same, summed per completion (nats)",
    "eval_kl_own_samples": "reverse KL to the teacher, on the student's samples (nats per token)",
    "eval_overlap": "top-K overlap with the teacher",
    "eval_score": "score of the student's samples",
}


def plot_curves(metrics: Path, image: Path) -> None:
    """Plot the logged figures against the step."""
    lines = _read(metrics)
    logged = {name for line in lines for name in line}
    panels = {title: names for title, names in PANELS.items() if logged & set(names)}
    figure = Figure(figsize=(10, 2.6 * len(panels) / 2), dpi=120, layout="tight")
    for position, (title, names) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(-(-len(panels) // 2), 2, position, title=title, xlabel="step")
        axis.grid(alpha=0.3)
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = name.replace("_", " ").replace("eval", "held-out")
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(image)


def before_after(metrics: Path, samples: Path, shown: int = 3) -> str:
    """Markdown: the first and last held-out measurement side by side, and a few completions."""
    evaluations = [line for line in _read(metrics) if "eval_kl" in line]
    first, last = evaluations[0], evaluations[-1]
    lines = ["| held-out | before | after |", "|---|---|---|"]
    for name, title in ROWS.items():
        if name in last:
            lines.append(f"| {title} | {first[name]:.3f} | {last[name]:.3f} |")
    texts = {(row["step"], row["prompt"]): row for row in _read(samples)}
    for prompt in list(dict.fromkeys(prompt for _, prompt in texts))[:shown]:
        before, after = texts[first["step"], prompt], texts[last["step"], prompt]
        lines += ["", f"**{prompt}**", f"- before: {_one_line(before['student'])}"]
        lines += [f"- after: {_one_line(after['student'])}"]
        lines += [f"- teacher: {_one_line(after['teacher'])}"]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:240]

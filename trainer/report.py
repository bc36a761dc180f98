"""What a run leaves to look at: its curves, and the table before and after on held-out prompts."""

from pathlib import Path

import pandas
from matplotlib import pyplot

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


def plot_curves(metrics: Path, image: Path) -> None:
    """Plot the logged figures against the step."""
    pyplot.switch_backend("Agg")
    log = pandas.read_json(metrics, lines=True).groupby("step").first()
    panels = [title for title, names in PANELS.items() if set(names) & set(log)]
    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 2.6 * rows), layout="tight", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, title in zip(axes.flat, panels, strict=False):
        for name in [name for name in PANELS[title] if name in log]:
            label = name.replace("eval", "held-out").replace("_", " ")
            log[name].dropna().plot(ax=axis, label=label, marker="o", markersize=3)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)


def before_after(metrics: Path, samples: Path, shown: int = 3) -> str:
    """Markdown: the first and last held-out measurement side by side, and a few completions."""
    log = pandas.read_json(metrics, lines=True).dropna(subset="eval_reverse_kl")
    lines = ["| held-out | before | after |", "|---|---|---|"]
    for name, figures in log.filter(like="eval_").items():
        title = str(name).removeprefix("eval_").replace("_", " ")
        lines.append(f"| {title} | {figures.iloc[0]:.3f} | {figures.iloc[-1]:.3f} |")
    completions = pandas.read_json(samples, lines=True)
    for prompt, rows in list(completions.groupby("prompt", sort=False))[:shown]:
        student = rows.drop_duplicates("step", keep="last").set_index("step")["student"]
        first, last = (student[log["step"].iloc[i]] for i in (0, -1))
        texts = {"before": first, "after": last, "teacher": rows["teacher"].iloc[-1]}
        lines += ["", f"**{prompt}**"]
        lines += [f"- {name}: {' '.join(text.split())[:240]}" for name, text in texts.items()]
    return "\n".join(lines) + "\n"

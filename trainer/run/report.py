"""Reports of runs: curves, a Markdown summary of one run, and an HTML page of several."""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from io import StringIO
from itertools import chain, count, cycle
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure

from opd_trainer.data import read_json_lines
from opd_trainer.errors import convert_errors
from opd_trainer.run import METRICS, check_run
from opd_trainer.run.directory import CONFIG, REPORT, SAMPLES

PANELS = {
    "loss per token (nats)": ["loss"],
    "gradient norm": ["grad_norm"],
    "probability of the support": ["student_mass", "teacher_mass"],
    "top-K overlap with the teacher": ["overlap", "eval_overlap"],
    "entropy (nats)": ["student_entropy", "teacher_entropy"],
    "completion length (tokens)": ["completion_length", "eval_completion_length"],
    "held-out reverse KL (nats per token)": ["eval_reverse_kl", "eval_reverse_kl_on_own_samples"],
    "held-out score": ["eval_score", "eval_teacher_score"],
}
SPEED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
TOTALS = ("epoch", "train_loss", *SPEED)  # of a whole run: they have no curves
Sample = tuple[str, str, float | None]  # title, completion, score


@dataclass
class Run:
    """The content of a run's directory, and the colour of its curves."""

    path: Path
    color: str | None = None

    def __post_init__(self) -> None:
        config = self.path / CONFIG
        self.config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        self.metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)  # steps and values
        self.alarms: dict[str, list[int]] = defaultdict(list)  # steps by message
        for line in read_json_lines(self.path / METRICS, may_be_cut=True):
            if line.get("alarm"):
                self.alarms[str(line["alarm"])].append(line["step"])
            for name, value in line.items():
                if name != "step" and type(value) in (int, float):
                    self.metrics[name].append((line["step"], value))
                    if not math.isfinite(value):
                        self.alarms[f"{name} is {value}"].append(line["step"])

    def samples(self) -> dict[str, list[Sample]]:
        """Return the first and last held-out completions and the teacher's, by prompt."""
        steps = {step for points in self.metrics.values() for step, _ in points}
        paths = {step: self.path / SAMPLES.format(step) for step in sorted(steps)}
        kept = [(step, path) for step, path in paths.items() if path.exists()]
        ends = [(s, read_json_lines(x, may_be_cut=True)) for s, x in kept[:1] + kept[1:][-1:]]
        samples: dict[str, list[Sample]] = defaultdict(list)
        for title, (step, rows) in zip(("before", "after"), ends, strict=False):
            for row in rows:
                of_prompt = samples[row["prompt"]]
                of_prompt.append((f"{title} (step {step})", row["student"], row.get("score")))
                if rows is ends[-1][1] and row.get("teacher") is not None:
                    of_prompt.append(("teacher", row["teacher"], None))
        return samples


def plot_curves(run: Path) -> None:
    """Plot the main metrics against the step, as curves.png."""
    runs = [Run(run)]
    panels = [panel for panel in _panels(runs) if panel[0] in PANELS]
    figure = Figure(figsize=(10, 1.4 * max(2, len(panels))), dpi=120, layout="tight")
    for position, (title, names) in enumerate(panels, start=1):
        axis = figure.add_subplot((len(panels) + 1) // 2, 2, position, title=title, xlabel="step")
        _draw(axis, runs, names)
        axis.legend()
    figure.savefig(run / "curves.png")


def held_out_changes(run: Run) -> list[tuple[str, float, float]]:
    """Return title, first and last value of each held-out metric."""
    metrics = {n: x for n, x in run.metrics.items() if n.startswith("eval_")}
    return [(_label(n.removeprefix("eval_")), x[0][1], x[-1][1]) for n, x in metrics.items()]


def before_after(run: Path, shown: int = 3) -> str:
    """Return Markdown of the first and last held-out metrics and completions; write report.md."""
    logged = Run(run)
    lines = ["| held-out | before | after |", "|---|---|---|"]
    for title, before, after in held_out_changes(logged):
        lines.append(f"| {title} | {before:.3f} | {after:.3f} |")
    if len(lines) == 2:
        lines = ["No held-out evaluation was logged."]
    for prompt, samples in list(logged.samples().items())[:shown]:
        lines += ["", f"**{prompt}**"]
        for title, text, _ in samples:
            lines.append(f"- {title.partition(' (')[0]}: {' '.join(text.split())[:240]}")
    (run / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)


def write_report(runs: list[Path], output: Path) -> None:
    """Write a page that compares runs and needs no other file, no network and no script.

    Raises:
        ValueError: a path is not the directory of a run.
    """
    # Hues a golden section apart differ, however many there are.
    colors = (to_hex(hsv_to_rgb(((0.58 + 0.382 * i) % 1, 0.75, 0.82))) for i in count())
    loaded, samples = [], []
    for path, color in zip(dict.fromkeys(runs), colors, strict=False):
        check_run(path)
        with convert_errors(f"{path}: expected a recipe's output_dir"):
            loaded.append(run := Run(path, color))
            samples.append((run, run.samples()))
    names = dict.fromkeys(name for run in loaded for name in run.metrics)
    panels = sorted(_panels(loaded), key=lambda panel: not panel[0].startswith("held-out"))
    configs = [run.config for run in loaded if run.config]
    rows = [(k, [str(x.get(k, "–")) for x in configs]) for k in dict.fromkeys(chain(*configs))]
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(autoescape=True, loader=loader, undefined=StrictUndefined)
    page = pages.get_template("report.html").render(
        runs=loaded,
        metrics=[name for name in names if name.startswith("eval_") or name in TOTALS],
        panels=[(title, shown, _svg(loaded, shown)) for title, shown in panels],
        prompts={p: [(run, s[p]) for run, s in samples if p in s] for _, s in samples for p in s},
        keys=sorted(rows, key=lambda row: len(set(row[1])) == 1),
        label=_label,
    )
    # JSON can hold a lone surrogate, which UTF-8 cannot encode.
    output.write_text(page, encoding="utf-8", errors="replace")


def _panels(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return titles with names of metrics: those of PANELS first, then one panel per family."""
    titles = {name: title for title, names in PANELS.items() for name in names}
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys([*titles, *logged]):
        plain = name.removeprefix("eval_")
        family = re.sub(r"_from_\d+$", "_by_position", plain if plain in logged else name)
        if name in logged and name not in TOTALS:
            panels.setdefault(titles.get(name, _label(family)), []).append(name)
    return list(panels.items())


def _draw(axis: Axes, runs: list[Run], names: list[str]) -> list[str]:
    """Draw curves with at most about 100 marks each; return the text of each mark."""
    texts = []
    for name, style in zip(names, cycle(("-", "--", ":", "-.", (0, (1, 4)))), strict=False):
        for run in [run for run in runs if name in run.metrics]:
            points, label = run.metrics[name], _label(name)
            stride = len(points) // 100 + 1
            (line,) = axis.plot(*zip(*points, strict=True), label=label, color=run.color)
            line.set(linestyle=style, marker="o", markersize=3, markevery=stride)
            texts += [f"step {x}: {y:.6g}" for x, y in points[::stride] if math.isfinite(y)]
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    return texts


def _svg(runs: list[Run], names: list[str]) -> Markup:
    """Return a panel's curves, whose marks show step and value under the mouse."""
    figure, file = Figure(figsize=(4.6, 2), layout="constrained"), StringIO()
    axis = figure.add_subplot()
    texts = iter(_draw(axis, runs, names))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)  # ticks are marks too, and would take the curves' texts
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", file.getvalue(), flags=re.S)
    svg = re.sub("(<use [^>]*)/>", lambda use: f"{use[1]}><title>{next(texts)}</title></use>", svg)
    # matplotlib has escaped all text in it.
    return Markup(svg[svg.index("<svg") :])  # nosec B704


def _label(name: str) -> str:
    return re.sub("^eval_", "held-out ", name).replace("_kl", " KL").replace("_", " ")

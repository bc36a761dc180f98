"""Plots of time and peak memory by one of N, V and K, with the others fixed."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measurement import MIB, measure
from benchmarks.problems import Problem

BASE = Problem(tokens=512, dim=128, vocab=151_936)
SWEEPS = {
    "tokens": [512, 1024, 2048, 4096, 8192, 16_384],
    "vocab": [16_384, 32_768, 65_536, 131_072, 262_144],
    "k": [1, 4, 16, 64, 256, 1024],
}
PROVIDERS = ["ours_one_pass", "ours_recompute", "ours_full", "eager_topk", "eager_full"]
LABELS = {"tokens": "N, tokens", "vocab": "V, vocabulary", "k": "K, size of the support"}
# Eager code holds several tensors of full logits at a time; it is left out where one is larger.
_MAX_LOGITS_BYTES = 2 << 30


def run(axis: str, output: Path) -> str:
    """Measure along one axis, write the records and their plot; returns a line about them."""
    records = []
    for value in tqdm(SWEEPS[axis], desc=axis):
        problem = replace(BASE, **{axis: value})  # type: ignore[arg-type]
        too_large = problem.tokens * problem.vocab * 4 > _MAX_LOGITS_BYTES
        providers = [p for p in PROVIDERS if not (too_large and p.startswith("eager"))]
        for name, measured in measure(problem, providers, 1).items():
            record = {"provider": name, "seconds": measured.median(), **asdict(problem)}
            records.append(record | {"peak_extra_bytes": measured.peak_extra_bytes})
    (output / f"sweep_{axis}.json").write_text(json.dumps(records, indent=2))
    path = output / f"sweep_{axis}.png"
    plot(axis, records, path)
    return f"{path}: {len(records)} points"


def plot(axis: str, records: list[dict[str, Any]], path: Path) -> None:
    """Write a plot with two logarithmic panels: seconds and peak extra memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in PROVIDERS:
        points = [r for r in records if r["provider"] == name]
        x = [r[axis] for r in points]
        style = {"marker": "o", "label": name, "linestyle": "--" if "eager" in name else "-"}
        panels[0].plot(x, [r["seconds"] for r in points], **style)
        panels[1].plot(x, [r["peak_extra_bytes"] / MIB for r in points], **style)
    fixed = {"tokens": "N", "dim": "D", "vocab": "V", "k": "K"}
    base = asdict(BASE)
    title = ", ".join(f"{letter} = {base[f]:,}" for f, letter in fixed.items() if f != axis)
    for panel, label in zip(panels, ("seconds, forward + backward", "peak extra MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel=label)
        panel.set_xticks(SWEEPS[axis], [f"{value:,}" for value in SWEEPS[axis]])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.minorticks_off()
        panel.grid(True, which="major", alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.suptitle(f"{title}, float32, two models, on the CPU")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

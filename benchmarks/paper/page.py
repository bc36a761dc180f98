"""docs/paper.md: what the paper says, what was seen here, and where they differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

HEAD = """# The paper in miniature

What [*The Many Faces of On-Policy Distillation*](https://arxiv.org/abs/2605.11182) says, tried on
models of less than a million parameters, and once on SmolLM2-135M, by the trainer's own stages and
objectives. `make paper` writes this page, from {} seeds. A figure is the mean of the seeds, with
their range. An effect counts as seen when every seed of the one is below every seed of the other.\
"""


@dataclass(frozen=True)
class Finding:
    """An expectation of the paper, and whether the seeds bear it out."""

    text: str
    holds: bool
    evidence: str
    asserted: bool = True  # or only reported, since the paper or theory leaves it open


@dataclass(frozen=True)
class Claim:
    """A section of the page, whose words are in claims.yaml."""

    number: int
    tables: list[str]
    places: dict[str, Any]  # of the words
    figure: Path
    findings: list[Finding]

    def failures(self) -> list[Finding]:
        """What was asserted and does not hold."""
        return [x for x in self.findings if x.asserted and not x.holds]


def apart(low: Sequence[float], high: Sequence[float]) -> bool:
    """Whether every seed of the one is below every seed of the other."""
    return max(low) < min(high)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean over seeds and their range."""
    low, mean, high = (f"{x:.{digits}f}" for x in (min(values), fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def rises(text: str, low: Sequence[float], high: Sequence[float]) -> Finding:
    """A finding that the first figures are below the second ones."""
    return Finding(text, apart(low, high), f"{spread(low)} below {spread(high)}")


def falls(text: str, high: Sequence[float], low: Sequence[float]) -> Finding:
    """A finding that the first figures are above the second ones."""
    return Finding(text, apart(low, high), f"{spread(high)} above {spread(low)}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_page(claims: Sequence[Claim], folder: Path, seeds: Sequence[int]) -> Path:
    """Write the page; returns its path."""
    words = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    parts = [HEAD.format(len(seeds))]
    for claim in claims:
        own = words[claim.number]
        parts += [
            f"## {claim.number}. {own['title']}",
            f"**The paper says**: {own['says']}",
            f"**The setting**: {own['setting']}",
            "**What was seen**",
            f"![claim {claim.number}]({claim.figure.relative_to(folder)})",
            own["caption"],
            *claim.tables,
            table(("expected", "seen", "figures"), [_row(x) for x in claim.findings]),
            f"**Where they differ**: {own['differs'].format(**claim.places)}",
        ]
    path = folder / "paper.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _row(finding: Finding) -> tuple[str, str, str]:
    seen = "yes" if finding.holds else "**no**"
    return finding.text, seen + " (reported only)" * (not finding.asserted), finding.evidence

"""Write docs/paper.md: what the paper claims, the results here, and the differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.markdown import markdown_table

HEAD = """# The paper in miniature

The claims of [*The Many Faces of On-Policy Distillation*](https://arxiv.org/abs/2605.11182), tested
with the trainer's own stages and objectives on models of less than a million parameters, and once
on SmolLM2-135M. `make paper` writes this page, from {} seeds. A value is the mean of the seeds,
with their range. An effect counts as observed when every seed of one run is below every seed of
the other.\
"""


@dataclass(frozen=True)
class Finding:
    """An expected effect, and whether the seeds show it."""

    text: str
    holds: bool
    evidence: str
    asserted: bool = True  # False: only reported, because the paper or theory leaves it open


@dataclass(frozen=True)
class Claim:
    """A section of the page; its texts are in claims.yaml."""

    number: int
    tables: list[str]
    values: dict[str, Any]  # for the names in braces in the text of the differences
    figure: Path
    findings: list[Finding]

    def failures(self) -> list[Finding]:
        """Return the findings that are asserted and do not hold."""
        return [x for x in self.findings if x.asserted and not x.holds]


def is_below(low: Sequence[float], high: Sequence[float]) -> bool:
    """Return whether every value of low is below every value of high."""
    return max(low) < min(high)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the mean over seeds and their range."""
    low, mean, high = (f"{x:.{digits}f}" for x in (min(values), fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def rises(text: str, low: Sequence[float], high: Sequence[float]) -> Finding:
    """Return the finding that the first values are below the second ones."""
    return Finding(text, is_below(low, high), f"{spread(low)} below {spread(high)}")


def falls(text: str, high: Sequence[float], low: Sequence[float]) -> Finding:
    """Return the finding that the first values are above the second ones."""
    return Finding(text, is_below(low, high), f"{spread(high)} above {spread(low)}")


def write_page(claims: Sequence[Claim], folder: Path, seeds: Sequence[int]) -> Path:
    """Write the page; returns its path."""
    texts = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    parts = [HEAD.format(len(seeds))]
    for claim in claims:
        text = texts[claim.number]
        parts += [
            f"## {claim.number}. {text['title']}",
            f"**Claim**: {text['claim']}",
            f"**Setup**: {text['setup']}",
            "**Results**",
            f"![claim {claim.number}]({claim.figure.relative_to(folder)})",
            text["caption"],
            *claim.tables,
            markdown_table(("expected", "observed", "values"), map(_row, claim.findings)),
            f"**Differences**: {text['differences'].format(**claim.values)}",
        ]
    path = folder / "paper.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _row(finding: Finding) -> tuple[str, str, str]:
    observed = "yes" if finding.holds else "**no**"
    return finding.text, observed + " (reported only)" * (not finding.asserted), finding.evidence

"""Test the paper's claims on tiny models, and write docs/paper.md with its figures."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.paper import (
    adapted_teacher,
    biased_gradient,
    foreign_habits,
    mismatch,
    self_distillation,
)
from benchmarks.paper.page import Claim, write_page
from benchmarks.paper.runs import Laboratory

CLAIMS: dict[int, Callable[[Laboratory, Sequence[int], Path], Claim]] = {
    1: biased_gradient.claim,
    2: mismatch.claim,
    3: adapted_teacher.claim,
    4: foreign_habits.claim,
    5: self_distillation.claim,
}


def main(argv: list[str] | None = None) -> None:
    """Run the chosen claims and write the page; exit with an error if an assertion fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--claims", type=int, nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per run")
    parser.add_argument("--workers", type=int, default=2, help="number of one-thread processes")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="finished runs")
    arguments = parser.parse_args(argv)
    seeds = range(1, arguments.seeds + 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with Laboratory(arguments.runs, arguments.workers) as lab:
        claims = [CLAIMS[number](lab, seeds, arguments.output) for number in arguments.claims]
    print(write_page(claims, arguments.output, seeds))
    failures = [
        f"claim {claim.number}: {finding.text}: {finding.evidence}"
        for claim in claims
        for finding in claim.failures()
    ]
    if failures:
        sys.exit("These findings did not hold:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()

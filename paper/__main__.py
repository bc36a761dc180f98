"""python -m paper [--claims 1 5] [--seeds 3] [--output docs]: the paper's claims in miniature."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from paper import adapted_teacher, biased_gradient, foreign_habits, mismatch, self_distillation
from paper.page import Claim, write_page
from paper.runs import Laboratory

CLAIMS: dict[int, Callable[[Laboratory, Sequence[int], Path], Claim]] = {
    1: biased_gradient.claim,
    2: mismatch.claim,
    3: adapted_teacher.claim,
    4: foreign_habits.claim,
    5: self_distillation.claim,
}


def main(argv: list[str] | None = None) -> None:
    """Run the claims, write the page, and fail where an assertion does."""
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__)
    parser.add_argument("--claims", type=int, nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="page and figures")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="kept runs")
    arguments = parser.parse_args(argv)
    seeds = range(1, arguments.seeds + 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with Laboratory(arguments.runs, arguments.workers) as lab:
        claims = [CLAIMS[number](lab, seeds, arguments.output) for number in arguments.claims]
    print(write_page(claims, arguments.output, seeds))
    failures = [
        f"claim {claim.number}: {x.text}: {x.evidence}"
        for claim in claims
        for x in claim.failures()
    ]
    if failures:
        sys.exit("not borne out:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()

"""Measure the losses and compare them with peers; README.md and docs/ quote the results."""

import argparse

from benchmarks import (
    audit,
    backends,
    chunks,
    compare,
    gpu,
    gradient_filter,
    roofline,
    trainer_step,
    tune,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (
        compare,
        trainer_step,
        chunks,
        gradient_filter,
        audit,
        roofline,
        tune,
        backends,
        gpu,
    ):
        module.add_parser(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

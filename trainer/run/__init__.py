"""The directory of a run, its checkpoints, and what it prints."""

from pathlib import Path

METRICS = "metrics.jsonl"  # the log of a run


def check_run(run: Path) -> None:
    """Raise ValueError unless a path is the directory of a run."""
    if not (run / METRICS).exists():
        raise ValueError(f"{run}: expected a recipe's output_dir; it has no {METRICS}")

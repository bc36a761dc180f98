"""Checkpoints that are whole or absent, and a log of metrics that goes on where a run resumes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from trainer.config import DistillationConfig

METRICS = "metrics.jsonl"


class DurableTrainer(Trainer):
    """A Trainer with metrics.jsonl, whose checkpoints are written aside and moved into place."""

    _logged = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # what a kill left half written
            shutil.rmtree(run / ".saving", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = f"{run}/.saving"
        super()._save_checkpoint(model, trial)
        self.args.output_dir = str(run)
        if self.args.should_save:
            self.save_more(run / ".saving" / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(run / ".saving" / name, run / name)
            rotate_checkpoints(str(run), self.args.save_total_limit)

    def save_more(self, checkpoint: Path) -> None:
        """For what a subclass keeps beside the student, before the checkpoint is published."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to metrics.jsonl too; a resumed run first drops what its checkpoint did not see."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            lines = self.state.log_history[-1:] if self._logged else self.state.log_history
            with (Path(self.args.output_dir) / METRICS).open("a" if self._logged else "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._logged = True


def publish(staged: Path, final: Path) -> None:
    """Move a directory into place once it is on the disk: it is seen whole or not at all."""
    for path in filter(Path.is_file, staged.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        os.replace(final, staged.with_suffix(".old"))
    os.replace(staged, final)
    shutil.rmtree(staged.with_suffix(".old"), ignore_errors=True)


def claim_output_directory(config: DistillationConfig) -> str | None:
    """Make the run's directory, or return its newest checkpoint, to resume from."""
    run = Path(config.output_dir)
    steps = [int(p.name[11:]) for p in run.glob("checkpoint-*") if p.name[11:].isdigit()]
    if config.resume_from_checkpoint:
        if not steps:
            raise ValueError(f"resume_from_checkpoint: {run} has no checkpoint; leave it out")
        return str(run / f"checkpoint-{max(steps)}")
    if steps or (run / METRICS).exists():
        remedy = ", or --resume_from_checkpoint auto" if steps else ""
        raise ValueError(f"output_dir: {run} holds another run; choose another one{remedy}")
    run.mkdir(parents=True, exist_ok=True)
    return None

"""Checkpoints that are whole or absent, and a log of metrics that goes on where a run resumes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from trainer.config import DistillationConfig

METRICS = "metrics.jsonl"


class DurableTrainer(Trainer):
    """A Trainer with metrics.jsonl, whose checkpoints are written aside and moved into place."""

    _saving = _logged = False

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return f"{run}/.saving" if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._saving = True
        super()._save_checkpoint(model, trial)
        self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
            publish(run / ".saving" / name, run / name)
            rotate_checkpoints(str(run), self.args.save_total_limit)

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
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)


def claim_output_directory(config: DistillationConfig) -> str | None:
    """Make the run's directory, or find the checkpoint to resume from: "auto" takes the newest."""
    run, resume = Path(config.output_dir), config.resume_from_checkpoint
    if resume is None and ((run / METRICS).exists() or any(run.glob("checkpoint-*"))):
        raise ValueError(
            f"output_dir: {run} holds another run; choose another directory, or go on with it by "
            "--resume_from_checkpoint auto"
        )
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(run) if resume == "auto" else resume
    if resume is not None and (checkpoint is None or not Path(checkpoint).is_dir()):
        raise ValueError(f"resume_from_checkpoint: expected a checkpoint in {run}, got {resume!r}")
    return checkpoint

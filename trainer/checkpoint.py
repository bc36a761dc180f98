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

    _saving = _logged = False

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return f"{run}/.saving" if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # what a kill left half written
            shutil.rmtree(f"{self.args.output_dir}/.saving", ignore_errors=True)
        self.accelerator.wait_for_everyone()
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
    if final.exists():
        os.replace(final, staged.with_suffix(".old"))
    os.replace(staged, final)
    shutil.rmtree(staged.with_suffix(".old"), ignore_errors=True)


def claim_output_directory(config: DistillationConfig) -> str | None:
    """Make the run's directory, or find the checkpoint to resume from: "auto" takes the newest."""
    run, resume = Path(config.output_dir), config.resume_from_checkpoint
    steps = {
        p.resolve(): int(p.name[11:]) for p in run.glob("checkpoint-*") if p.name[11:].isdigit()
    }
    if resume is None:
        if steps or (run / METRICS).exists():
            remedy = ", or --resume_from_checkpoint auto" if steps else ""
            raise ValueError(f"output_dir: {run} holds another run; choose another one{remedy}")
        run.mkdir(parents=True, exist_ok=True)
        return None
    newest = max(steps, key=lambda path: steps[path], default=None)
    path = newest if resume == "auto" else Path(resume).resolve()
    if path not in steps:
        expected = f"expected 'auto' or one of {sorted(p.name for p in steps)} in {run}"
        raise ValueError(f"resume_from_checkpoint: {expected}, got {resume!r}")
    if path != newest:
        remedy = f"move away what is past it, up to {newest}"
        raise ValueError(f"resume_from_checkpoint: {resume} is not the newest; {remedy}")
    return str(path)

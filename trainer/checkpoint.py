"""Checkpoints that are whole or absent, and a log of metrics that goes on where a run resumes.

transformers writes checkpoint-N in place and resumes from the highest number, half written or not.
Here one is written aside, sealed with a manifest of sizes and hashes, and moved into place; resuming
takes the newest whose manifest holds.
"""

import hashlib
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
_MANIFEST = "manifest.json"


class DurableTrainer(Trainer):
    """A Trainer with atomic checkpoints and metrics.jsonl."""

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
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to metrics.jsonl too; a resumed run first drops what its checkpoint did not see."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            lines = self.state.log_history[-1:] if self._logged else self.state.log_history
            with (Path(self.args.output_dir) / METRICS).open("a" if self._logged else "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._logged = True


def publish(staged: Path, final: Path) -> None:
    """Seal a staged checkpoint and move it into place, where it is seen whole or not at all."""
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    manifest = {str(path.relative_to(staged)): _fingerprint(path) for path in files}
    (staged / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, staged / _MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says."""
    if not (checkpoint / _MANIFEST).is_file():
        return f"{_MANIFEST} is missing"
    for name, expected in json.loads((checkpoint / _MANIFEST).read_text()).items():
        path = checkpoint / name
        if not path.is_file() or _fingerprint(path) != expected:
            return f"{name} is missing or not as it was saved"
    return None


def claim_output_directory(config: DistillationConfig) -> str | None:
    """Make the run's directory, or find the checkpoint to resume from: the newest valid, or the named."""
    run, resume = Path(config.output_dir), config.resume_from_checkpoint
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    if resume is None:
        if found or (run / METRICS).exists():
            raise ValueError(
                f"output_dir: {run} holds another run; choose another directory, or go on with it by "
                "--resume_from_checkpoint auto"
            )
        run.mkdir(parents=True, exist_ok=True)
        return None
    newest_first = sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))
    for path in newest_first if resume == "auto" else [Path(resume)]:
        reason = defect(path)
        if reason is None:
            return str(path)
        print(f"warning: {path} is damaged: {reason}", flush=True)
    raise ValueError(
        f"resume_from_checkpoint: expected a valid checkpoint in {run}, got {resume!r}"
    )


def _fingerprint(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]

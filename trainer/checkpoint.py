"""Checkpoints that are whole or absent, a log of metrics that goes on where a run resumes, and runs
that save when they are told to stop.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import rotate_checkpoints

from trainer.config import StageConfig

METRICS, CONFIG, MANIFEST = "metrics.jsonl", "config.json", "manifest.json"


class DurableTrainer(Trainer):
    """A Trainer with metrics.jsonl, whose checkpoints are written aside and moved into place."""

    _logged = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.interruption = _Interruption(self)
        self.add_callback(self.interruption)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # what a kill left half written
            shutil.rmtree(run / ".saving", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = f"{run}/.saving"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run)
        self.save_more(run / ".saving" / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(run / ".saving" / name, run / name)
            rotate_checkpoints(str(run), self.args.save_total_limit)

    def save_more(self, checkpoint: Path) -> None:
        """For what every rank of a subclass keeps beside the student, before it is published."""

    def save_last_step(self) -> None:
        """A checkpoint of the last whole step, where a run cannot go on and is of one process."""
        step = self.state.global_step
        exists = (Path(self.args.output_dir) / f"checkpoint-{step}").exists()
        if step > 0 and not exists and self.args.world_size == 1:
            self._save_checkpoint(self.model, None)

    def save_student(self) -> Path:
        """The student alone, as model/; when the run is over."""
        run = Path(self.args.output_dir)
        self.save_model(f"{run}/.saving/model")
        if self.is_world_process_zero():
            publish(run / ".saving/model", run / "model")
        return run / "model"

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log to metrics.jsonl too; a resumed run first drops what its checkpoint did not see."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            lines = self.state.log_history[-1:] if self._logged else self.state.log_history
            with (Path(self.args.output_dir) / METRICS).open("a" if self._logged else "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._logged = True


class _Interruption(TrainerCallback):
    """On Ctrl-C or SIGTERM to any rank, all finish the step, save and stop; on another, at once."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer, self.requested, self.stopped = trainer, False, False
        self.previous: dict[int, Any] = {}

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        print("\nfinishing this step, then saving; once more to stop at once", flush=True)
        signal.signal(number, self.previous[number])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        flag = torch.tensor(float(self.requested), device=args.device)
        self.stopped = bool(self.trainer.accelerator.reduce(flag, "sum") > 0)
        if self.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def publish(staged: Path, final: Path) -> None:
    """Move a directory out of the one where it was made, with a manifest, once it is on the disk:
    it is seen whole or not at all.
    """
    manifest = {}
    for path in sorted(filter(Path.is_file, staged.rglob("*"))):
        with path.open("rb") as file:
            manifest[str(path.relative_to(staged))] = _digest(file)
            os.fsync(file.fileno())
    with (staged / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        os.replace(final, staged.with_suffix(".old"))
    os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What differs from the checkpoint's manifest, or None if it is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest.items():
            with (checkpoint / name).open("rb") as file:
                if _digest(file) != expected:
                    return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def claim_output_directory(config: StageConfig) -> str | None:
    """Make the run's directory, or return its newest whole checkpoint, to resume from."""
    run = Path(config.output_dir)
    steps = [int(p.name[11:]) for p in run.glob("checkpoint-*") if p.name[11:].isdigit()]
    checkpoint = None
    if config.resume_from_checkpoint:
        for step in sorted(steps, reverse=True):
            if (reason := damage(run / f"checkpoint-{step}")) is None:
                checkpoint = str(run / f"checkpoint-{step}")
                break
            warnings.warn(f"{run}/checkpoint-{step} is passed over: {reason}", stacklevel=2)
        else:
            whole = "whole " if steps else ""
            reason = f"{run} has no {whole}checkpoint; leave it out"
            raise ValueError(f"resume_from_checkpoint: {reason}")
    elif steps or (run / METRICS).exists():
        remedy = ", or --resume_from_checkpoint auto" if steps else ""
        raise ValueError(f"output_dir: {run} holds another run; choose another one{remedy}")
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(json.dumps(recipe_of(config), indent=1))
    return checkpoint


def recipe_of(config: StageConfig) -> dict[str, Any]:
    """The keys whose values are not the defaults; tokens of hubs are masked."""
    values = config.to_dict()
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory()
               for f in fields(config)}  # fmt: skip
    return {name: values[name] for name in default if values.get(name) != default[name]}

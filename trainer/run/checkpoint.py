"""Runs that save whole checkpoints, or none, go on with their log of metrics where they resume, and
save when they are told to stop.
"""

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from trainer.errors import SavingError
from trainer.run.directory import METRICS, MODEL, SAVING, publish, write_whole


class DurableTrainer(Trainer):
    """A Trainer with metrics.jsonl, whose checkpoints are written aside and moved into place."""

    _logged = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.interruption = _Interruption(self)
        self.add_callback(self.interruption)

    def _run_epoch(self, **options: Any) -> None:
        """Not after the last step, from whose checkpoint Trainer would make one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with self._saving(name):
            self.args.output_dir = f"{run}/{SAVING}"
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(run)
            self.save_more(run / SAVING / name)
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit)

    @contextmanager
    def _saving(self, name: str) -> Iterator[None]:
        """All ranks write a directory aside; then it is there under its name, or SavingError."""
        run = Path(self.args.output_dir)
        if self.args.should_save:  # what a kill left half written
            shutil.rmtree(run / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            yield
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # A pickle, which nobody reads and which would have the recipe's secrets.
                (run / SAVING / name / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                publish(run / SAVING / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has its own for each
            shutil.rmtree(run / SAVING, ignore_errors=True)
            raise SavingError(
                f"{run}/{name} could not be saved, what was saved before is whole: {error}"
            ) from error

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
        with self._saving(MODEL):
            self.save_model(f"{run}/{SAVING}/{MODEL}")
        return run / MODEL

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log to metrics.jsonl too; a resumed run first drops what its checkpoint did not see."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / METRICS
            lines = self.state.log_history[-1:] if self._logged else self.state.log_history
            text = "".join(json.dumps(line) + "\n" for line in lines)
            if self._logged:
                with path.open("a") as file:
                    file.write(text)
            else:
                write_whole(path, text)
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

"""A transformers Trainer that saves whole checkpoints or none, and saves when it is interrupted."""

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
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import StageConfig
from opd_trainer.errors import RunStoppedError, SavingError
from opd_trainer.run import METRICS
from opd_trainer.run.console import Console
from opd_trainer.run.directory import MODEL, SAVING, publish, write_whole
from opd_trainer.run.hub import push_checkpoint


class DurableTrainer(Trainer):
    """A Trainer that logs to metrics.jsonl and renames checkpoints once they are whole."""

    args: StageConfig
    _logged = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # One of them would print each log line as a dict.
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.console = Console(self.args)
        self.add_callback(self.console)
        self.interruption = _Interruption(self)
        self.add_callback(self.interruption)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Restore the state, but log, save and evaluate as often as the config says now."""
        progress = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)
        if self.state.global_step > max_steps:
            taken = f"the {self.state.global_step} steps that the run has taken"
            raise RunStoppedError(
                f"max_steps, num_train_epochs: expected at least {taken}, got {max_steps} steps"
            )
        return progress

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the optimiser, but take the learning rate from the config's schedule.

        Trainer would keep the old learning_rate, and take the next step with the rate that the old
        schedule had for it.
        """
        initial = list(self.lr_scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if not isinstance(schedule, LambdaLR):
            return
        schedule.base_lrs = initial
        for number, group in enumerate(self.optimizer.param_groups):
            rate = initial[number] * schedule.lr_lambdas[number](schedule.last_epoch)
            schedule._last_lr[number] = group["lr"] = rate
            group["initial_lr"] = initial[number]

    def _run_epoch(self, **options: Any) -> None:
        """Run an epoch, but not from the checkpoint of the last step: Trainer would add a step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)

    def _get_output_dir(self, trial: Any) -> str:
        return f"{self.args.output_dir}/{SAVING}"  # where Trainer writes checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with self._saving(name):
            super()._save_checkpoint(model, trial)
            self.save_more(run / SAVING / name)
        if self.args.push_to_hub and self.is_world_process_zero():
            push_checkpoint(self, run / name)
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: Trainer would copy the student over the run's files, and upload them all."""

    @contextmanager
    def _saving(self, name: str) -> Iterator[None]:
        """Let all ranks write a directory aside, then publish it; raise SavingError on failure."""
        run = Path(self.args.output_dir)
        if self.args.should_save:  # a killed run may have left half a checkpoint
            shutil.rmtree(run / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            yield
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # A pickle that nothing reads and that would contain the recipe's secrets.
                (run / SAVING / name / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                publish(run / SAVING / name, run / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of these
            shutil.rmtree(run / SAVING, ignore_errors=True)
            problem = "could not be saved; earlier checkpoints are intact"
            raise SavingError(f"{run}/{name} {problem}: {error}") from error

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save the student; adapters too with the ids that end a turn, which PEFT leaves out."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            causal_lm_of(self.model).generation_config.save_pretrained(
                output_dir or self.args.output_dir
            )

    def save_more(self, checkpoint: Path) -> None:
        """Write what a subclass keeps beside the student; called on every rank."""

    def save_last_step(self) -> None:
        """Save the last whole step of a run that cannot continue, if it has a single process."""
        step = self.state.global_step
        exists = (Path(self.args.output_dir) / f"checkpoint-{step}").exists()
        if step > 0 and not exists and self.args.world_size == 1:
            self._save_checkpoint(self.model, None)

    def save_student(self) -> Path:
        """Save the student at the end of the run, as model/ in save_dtype; return its path."""
        run, dtype = Path(self.args.output_dir), self.args.save_dtype
        if dtype and self.args.lora_r == 0:  # PEFT saves adapters in float32
            _convert(self.model, dtype)
        with self._saving(MODEL):
            self.save_model(f"{run}/{SAVING}/{MODEL}", _internal_call=True)
        if dtype and self.args.lora_r == 0:  # what is evaluated next is what was saved
            _convert(self.model, self.args.dtype)
        return run / MODEL

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log to metrics.jsonl too; a resumed run first drops the lines after its checkpoint."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            path, lines = Path(self.args.output_dir) / METRICS, self.state.log_history
            if self._logged:
                with path.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
            else:
                write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._logged = True


def _convert(model: nn.Module, dtype: str) -> None:
    """Convert parameters in place, also split ones; Module.to would round the buffers too, such as
    the frequencies of rotary embeddings.
    """
    to = getattr(torch, dtype)
    model._apply(lambda x: x.to(to) if isinstance(x, nn.Parameter) else x)


class _Interruption(TrainerCallback):
    """Stops all ranks after the current step when one gets Ctrl-C or SIGTERM; the second signal
    ends a rank at once.
    """

    def __init__(self, trainer: DurableTrainer) -> None:
        self.accelerator, self.stopped = trainer.accelerator, False
        self.has_begun = False  # whether the first step has
        self.previous: dict[int, Any] = {}

    def _request(self, number: int, frame: Any) -> None:
        self.accelerator.set_trigger()
        print("\nfinishing this step, then saving; press Ctrl-C again to stop at once", flush=True)
        signal.signal(number, self.previous[number])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.has_begun = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.stopped = self.accelerator.check_trigger()
        if self.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

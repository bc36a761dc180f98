"""Uploads of the student to the Hugging Face Hub."""

import warnings
from pathlib import Path

import transformers.trainer
from peft import PeftModel
from transformers import Trainer
from transformers.modelcard import TrainingSummary

from opd_trainer.config import StageConfig
from opd_trainer.errors import RunStoppedError, convert_errors
from opd_trainer.run.directory import REPORT

# What a checkpoint holds beside the student.
_NOT_OF_THE_MODEL = [
    "manifest.json", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json",
    "held_out_completions.json", "rollout-*.json", "teacher/*", "pytorch_model_fsdp*",
]  # fmt: skip


def create_repository(config: StageConfig) -> str:
    """Create the repository of push_to_hub unless it exists; return its name on the hub."""
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    expected = f"push_to_hub: expected access to {name} on the hub, by `hf auth login` or HF_TOKEN"
    with convert_errors(expected):
        url = _api().create_repo(name, private=config.hub_private_repo, exist_ok=True)
        return url.repo_id


def push_student(trainer: Trainer, folder: Path) -> None:
    """Upload the student at the end of a run, with a model card and its report."""
    _write_card(trainer, folder)
    with convert_errors(
        f"push_to_hub: the student is in {folder} but could not be uploaded; run "
        f"`hf upload {trainer.hub_model_id} {folder}`", RunStoppedError,
    ):  # fmt: skip
        _upload(trainer, folder, "", "End of training")


def push_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Upload the student of a checkpoint, and the checkpoint itself, as hub_strategy says."""
    strategy, step = trainer.args.hub_strategy.value, trainer.state.global_step
    message = f"Training in progress, step {step}"
    try:
        if strategy != "end":
            _upload(trainer, checkpoint, "", message)
        if strategy in ("checkpoint", "all_checkpoints"):
            place = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
            _upload(trainer, checkpoint, place, f"{message}, checkpoint")
    except Exception as error:  # the network may be back at the next checkpoint
        problem = f"push_to_hub: {checkpoint.name} could not be uploaded, and the run goes on"
        warnings.warn(f"{problem}: {error}", stacklevel=2)


def _write_card(trainer: Trainer, folder: Path) -> None:
    """Write the README.md of a student: transformers' summary, and the held-out metrics."""
    card = TrainingSummary.from_trainer(trainer, model_name=trainer.hub_model_id.split("/")[-1])
    # transformers says so of every model that has no name on the hub.
    text = card.to_model_card().replace(
        "was trained from scratch", "is fine-tuned from a local model"
    )
    report = Path(trainer.args.output_dir) / REPORT
    if report.exists():  # its table, without the data's prompts
        table = report.read_text(encoding="utf-8").partition("\n\n")[0]
        text += f"\n## Held-out results\n\n{table}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    if isinstance(trainer.model, PeftModel):
        trainer.model.create_or_update_model_card(str(folder))


def _upload(trainer: Trainer, folder: Path, place: str, message: str) -> None:
    _api().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        path_in_repo=place or None,
        commit_message=message,
        revision=trainer.args.hub_revision,
        ignore_patterns=None if place else _NOT_OF_THE_MODEL,
    )


def _api() -> "transformers.trainer.HfApi":
    return transformers.trainer.hf_api()

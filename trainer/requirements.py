"""What a run needs besides its keys: packages, files, functions and access to the hub."""

from collections.abc import Iterable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from opd_trainer.config import DistillationConfig, EvaluationConfig, StageConfig, TeacherConfig
from opd_trainer.config.base import is_server
from opd_trainer.data import load_rows
from opd_trainer.errors import convert_errors
from opd_trainer.measures.scoring import load_scorer
from opd_trainer.models.load import load_tokenizer, locate
from opd_trainer.run.hub import create_repository
from opd_trainer.stages.distillation import build_loss

_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
_CHECKPOINTING = {*signature(checkpoint).parameters, "preserve_rng_state"}
_CHECKPOINTING |= {"every_n_layers", "offload"}  # Trainer's own
_NEEDS_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimisers that take the model


def check_requirements(config: StageConfig) -> None:
    """Raise what a run would otherwise raise only once its models are loaded."""
    teachers = config.teachers.values() if isinstance(config, TeacherConfig) else ()
    learns = not isinstance(config, EvaluationConfig)
    data = {"train_data": config.train_data if learns else None, "eval_data": config.eval_data}
    sources = {key: source for key, source in data.items() if source}
    _check_packages(config, sources.values())
    for key, source in sources.items():
        path = Path(source.partition("?")[0])
        if path.suffix in _FILES and not path.exists():
            place = "neither beside the recipe nor in the working directory"
            raise ValueError(f"{key}: expected data, got {source!r}, a file that is {place}")
        load_rows(source, keep_errors=config.on_bad_row == "drop")
    load_scorer(config)
    if isinstance(config, DistillationConfig):
        build_loss(config)
    if learns:
        _check_training(config)
    for name in dict.fromkeys([config.model, *teachers]):
        if name != "self" and not is_server(name) and not _is_gguf(name):
            load_tokenizer(name, config.trust_remote_code)
    if config.push_to_hub and config.process_index == 0:
        create_repository(config)


def _is_gguf(name: str) -> bool:
    """Return whether a model is a .gguf file, whose tokenizer takes 8 seconds to convert."""
    folder, gguf = locate(name)
    return bool(gguf) and Path(folder, gguf["gguf_file"]).exists()


def _check_packages(config: StageConfig, sources: Iterable[str]) -> None:
    """Raise ModuleNotFoundError for a missing package that not every run needs."""
    is_gym = config.scorer == "reasoning_gym"
    needed = {
        "openai": isinstance(config, TeacherConfig) and config.has_server,
        "vllm": config.rollout_engine == "vllm",
        "math_verify": config.scorer == "math_verify",
        "reasoning_gym": is_gym or any(x.startswith("reasoning_gym:") for x in sources),
    }
    for package in [name for name, is_needed in needed.items() if is_needed]:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _check_training(config: StageConfig) -> None:
    """Raise ValueError for what transformers refuses when it prepares the training."""
    with convert_errors(f"report_to: expected trackers that are installed, got {config.report_to}"):
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    optim = str(config.optim.value)
    with convert_errors(f"optim: expected an installed optimiser and its optim_args, got {optim}"):
        try:
            Trainer.get_optimizer_cls_and_kwargs(config)
        except ValueError:
            if not optim.startswith(_NEEDS_MODEL):
                raise
    expected = f"lr_scheduler_kwargs: expected options of {config.lr_scheduler_type.value}"
    with convert_errors(f"{expected}, got {config.lr_scheduler_kwargs}"):
        steps = max(config.max_steps, 10_000)
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate),
            config.get_warmup_steps(steps),
            steps,
            config.lr_scheduler_kwargs,
        )
    # TrainingArguments copies gradient_checkpointing_kwargs, the older name, into this key.
    if unknown := (config.activation_checkpointing_kwargs or {}).keys() - _CHECKPOINTING:
        expected = "expected options of torch.utils.checkpoint.checkpoint"
        key = "activation_checkpointing_kwargs"
        raise ValueError(f"{key}: {expected}, got {', '.join(sorted(unknown))}")
    with convert_errors("dataloader_num_workers: expected options of torch.utils.data.DataLoader"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=config.dataloader_num_workers,
            prefetch_factor=config.dataloader_prefetch_factor,
            persistent_workers=config.dataloader_persistent_workers,
            multiprocessing_context=config.dataloader_multiprocessing_context,
        )

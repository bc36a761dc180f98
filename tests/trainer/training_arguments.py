"""What a run does with every key of transformers' TrainingArguments.

`python -m tests.trainer.training_arguments` writes docs/training_arguments.md.
"""

from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from opd_trainer.config import DistillationConfig

PAGE = Path(__file__).parents[2] / "docs/training_arguments.md"
TRACKER = "passed to the trackers of `report_to`"
HUB = "the upload to the hub"
WORKERS = "the worker processes that collate prompts"
DDP = "passed to `DistributedDataParallel`"
EFFECTS = {  # what a key does in a run
    "output_dir": "the directory of the run",
    "per_device_train_batch_size": "prompts per rank and step",
    "num_train_epochs": "passes over the prompts",
    "max_steps": "optimiser steps",
    "learning_rate": "above 0",
    "lr_scheduler_type": "see the choices below",
    "lr_scheduler_kwargs": "options of the schedule",
    "warmup_steps": "steps, or a share of the run below 1",
    "optim": "see the choices below",
    "optim_args": "options of optimisers that take some",
    "optim_target_modules": "modules of galore and apollo optimisers",
    "weight_decay": "of the optimiser",
    "adam_beta1": "of the optimiser",
    "adam_beta2": "of the optimiser",
    "adam_epsilon": "of the optimiser",
    "max_grad_norm": "clips the gradient of a step; 0 does not",
    "bf16": "autocast in losses, rollouts and evaluation",
    "fp16": "autocast with a gradient scaler, on a GPU",
    "tf32": "products on a GPU",
    "activation_checkpointing": "the same gradient in less memory",
    "activation_checkpointing_kwargs": "options of `activation_checkpointing`",
    "gradient_checkpointing": "transformers' old name of `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "transformers' old name of `activation_checkpointing_kwargs`",
    "use_cache": "in the config of the saved student; `true` by default",
    "neftune_noise_alpha": "noise on the student's embeddings in losses, not in rollouts",
    "torch_empty_cache_steps": "empties the cache in every micro-batch of such a step",
    "logging_strategy": "see the choices below",
    "logging_steps": "a log line has the means of all steps since the line before",
    "logging_first_step": "logs the first step too",
    "log_on_each_node": "logs on each node",
    "logging_nan_inf_filter": "leaves out losses that are not finite",
    "include_num_input_tokens_seen": "counts prompts and completions of the student's losses",
    "log_level": "of transformers",
    "log_level_replica": "of transformers on other ranks",
    "disable_tqdm": "no progress bars",
    "report_to": "trackers, each with its own package",
    "run_name": TRACKER,
    "project": TRACKER,
    "trackio_space_id": TRACKER,
    "trackio_bucket_id": TRACKER,
    "trackio_static_space_id": TRACKER,
    "eval_strategy": "see the choices below",
    "eval_steps": "steps between evaluations, or a share of the run below 1",
    "eval_delay": "steps or epochs before the first evaluation",
    "per_device_eval_batch_size": "completions that are measured together",
    "eval_on_start": "evaluates before the first step; `true` by default",
    "save_only_model": "checkpoints without the optimiser's state, from which no run resumes",
    "save_strategy": "see the choices below",
    "save_steps": "steps between checkpoints, or a share of the run below 1",
    "save_on_each_node": "saves on each node",
    "save_total_limit": "checkpoints that are kept",
    "push_to_hub": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "ignore_data_skip": "a resumed run begins with the first prompts again",
    "full_determinism": "deterministic algorithms of PyTorch",
    "seed": "of the order of prompts and of all samples",
    "data_seed": "of the order of prompts alone; default `seed`",
    "use_cpu": "no GPU",
    "dataloader_drop_last": "no incomplete batch; with `steps_per_rollout` above 1 always",
    "dataloader_num_workers": WORKERS,
    "dataloader_persistent_workers": WORKERS,
    "dataloader_prefetch_factor": WORKERS,
    "dataloader_multiprocessing_context": WORKERS,
    "train_sampling_strategy": "see the choices below",
    "ddp_find_unused_parameters": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_static_graph": DDP,
    "ddp_backend": "of `torch.distributed`",
    "ddp_timeout": "seconds, of `torch.distributed`",
    "debug": "`underflow_overflow` reports activations that are not finite",
    "skip_memory_metrics": "`false` logs the memory of the run",
    "do_eval": "with `eval_strategy`",
    "resume_from_checkpoint": "`auto`, see [Training](training.md)",
}
PACKAGES = {  # of optimisers, by the beginning or end of their name
    "adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao", "galore": "galore_torch", "apollo": "apollo_torch",
    "grokadamw": "grokadamw", "schedule_free": "schedulefree", "stable_adamw": "torch-optimi",
    "adamw_bnb_8bit": "bitsandbytes", "adamw_8bit": "bitsandbytes", "ademamix": "bitsandbytes",
    "lion": "bitsandbytes", "paged": "bitsandbytes", "rmsprop_bnb": "bitsandbytes",
}  # fmt: skip
SCHEDULES = {  # options that a schedule needs
    "linear": {}, "cosine": {}, "cosine_with_restarts": {}, "polynomial": {}, "constant": {},
    "constant_with_warmup": {}, "inverse_sqrt": {}, "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {}, "greedy": {},
}  # fmt: skip
CHOICES = {  # of other keys
    "train_sampling_strategy": ["random", "sequential", "group_by_length", "batch_rebalance"],
    "eval_strategy": ["no", "steps", "epoch"],
    "logging_strategy": ["no", "steps", "epoch"],
    "save_strategy": ["no", "steps", "epoch", "best"],
    "include_num_input_tokens_seen": ["no", "non_padding", "all"],
    "debug": ["underflow_overflow", "tpu_metrics_debug"],
}
OPTIMISERS = [x.value for x in OptimizerNames]
KEYS = [f for f in fields(TrainingArguments) if f.init]
_VALUES = (True, False, 2, "x", ["x"], {"x": 1})


def refusal(key, value):
    """Return the error of a config with this value, or None."""
    given = {"model": "m", "train_data": "t.jsonl", "eval_data": "e.jsonl", "use_cpu": True}
    given |= {"privileged_context": "c", "report_to": "none"}
    try:
        DistillationConfig(**given | {key: value})
    except ValueError as error:
        return str(error)
    return None


def refused(key):
    """Return the error of a key that must keep its default, or None."""
    # Any value of these two but the default is wrong.
    others = {"gradient_accumulation_steps": "expected 1, ", "hub_token": "expected none, "}
    mark = others.get(key, "not supported")
    errors = (refusal(key, x) or "" for x in _VALUES)
    return next((error for error in errors if mark in error), None)


def needed_package(optimiser):
    names = [name for name in PACKAGES if optimiser.startswith(name)]
    return PACKAGES[max(names, key=len)] if names else None


def _without_value(key, error):
    return error.removeprefix(f"{key}: ").rpartition(", got ")[0] or error.removeprefix(f"{key}: ")


def page():
    """Return the documentation page."""
    lines = [
        "# TrainingArguments in a recipe",
        "",
        "A recipe takes the keys of `transformers.TrainingArguments` beside its own. A run honours "
        "a key, or refuses it in one line. `tests/trainer/test_training_arguments.py` tries every "
        "key and every choice; `python -m tests.trainer.training_arguments` writes this page.",
        "",
        "| key | |",
        "|---|---|",
    ]
    for field in KEYS:
        error = refused(field.name)
        effect = EFFECTS.get(field.name, "") if error is None else ""
        lines.append(f"| `{field.name}` | {effect or _refused_cell(field.name, error)} |")
    lines += ["", "## Choices", "", "| key | choice | |", "|---|---|---|"]
    for optimiser in OPTIMISERS:
        error = refusal("optim", optimiser)
        package = needed_package(optimiser)
        works = f"with the package {package}" if package else "yes"
        result = works if error is None else _refused_cell("optim", error)
        lines.append(f"| `optim` | `{optimiser}` | {result} |")
    for schedule, options in SCHEDULES.items():
        error = refusal("lr_scheduler_type", schedule)
        works = f"with `lr_scheduler_kwargs`, such as `{options}`" if options else "yes"
        result = works if error is None else _refused_cell("lr_scheduler_type", error)
        lines.append(f"| `lr_scheduler_type` | `{schedule}` | {result} |")
    for key, choices in CHOICES.items():
        for choice in choices:
            error = refusal(key, choice)
            result = "yes" if error is None else _refused_cell(key, error)
            lines.append(f"| `{key}` | `{choice}` | {result} |")
    return "\n".join(lines) + "\n"


def _refused_cell(key, error):
    assert error is not None, f"{key}: say in EFFECTS what it does"
    return f"refused: {_without_value(key, error).removeprefix('not supported; ')}"


if __name__ == "__main__":
    PAGE.write_text(page())

"""The starts of a run: the recipe of each, and what may change from one to the next."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj

from opd_trainer.config import StageConfig
from opd_trainer.config.base import is_server

Start = dict[str, Any]  # as in the run's starts.jsonl

# Keys that a resumed run may change: of schedule, logging, saving, held-out measurements, and of
# speed, memory and devices. Every other key, also one that transformers adds, decides what the
# student learns.
_KEYS = """
    max_steps num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    max_grad_norm max_skipped_steps

    logging_strategy logging_first_step logging_steps logging_nan_inf_filter log_level
    log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics
    debug preflight

    save_strategy save_steps save_total_limit save_on_each_node save_only_model
    enable_jit_checkpoint push_to_hub hub_model_id hub_private_repo hub_revision hub_strategy
    hub_always_push use_cache save_dtype ignore_data_skip restore_callback_states_from_checkpoint

    eval_data eval_strategy eval_steps eval_delay eval_on_start eval_completions_per_prompt
    eval_greedy eval_accumulation_steps per_device_eval_batch_size

    processes per_device_train_batch_size micro_batch_size micro_batch_tokens rollout_batch_size
    rollout_engine gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs torch_empty_cache_steps use_cpu tf32 full_determinism local_rank
    ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_static_graph ddp_broadcast_buffers
    ddp_find_unused_parameters dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context
    teacher_concurrency teacher_timeout teacher_patience trust_remote_code
"""
CHANGEABLE = frozenset(_KEYS.split())
_OF_SCORES = frozenset({"scorer", "answer_pattern"})  # measurements, unless they are the reward
_SOURCES = (
    "model", "teacher", "train_data", "eval_data", "scorer", "objective", "chat_template",
    "teacher_chat_template",
)  # fmt: skip
_HASHED = 1 << 26  # bytes; of larger files the size is compared
_MODEL_FILES = {".bin", ".gguf", ".jinja", ".json", ".model", ".safetensors"}


def describe_start(config: StageConfig, checkpoint: str | None) -> Start:
    """Return the record of a start: all keys, and hashes of the files that they name."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    for key in ("output_dir", "resume_from_checkpoint"):  # they say where the run is
        values.pop(key)
    return {
        "step": 0 if checkpoint is None else int(checkpoint.rpartition("-")[2]),
        "stage": type(config).__name__.removesuffix("Config"),
        "processes": config.world_size,
        "recipe": values,
        "contents": {key: _content(values[key]) for key in _SOURCES if key in values},
    }


def changes(before: Start, now: Start) -> list[str]:
    """Return the changes that a resumed run takes over, one per key.

    Raises:
        ValueError: a change would make it another run.
    """
    taken: list[str] = []
    refused: list[str] = []
    allowed = CHANGEABLE if now["stage"] == "RLVR" else CHANGEABLE | _OF_SCORES
    for key, change in _differences(before, now):
        (taken if key in allowed else refused).append(f"{key}: {change}")
    if refused:
        raise ValueError(
            "resume_from_checkpoint: expected the recipe that the run began with, got "
            f"{', '.join(refused)}; restore it, or choose another output_dir for a new run"
        )
    steps = now["recipe"]["max_steps"]
    if 0 < steps < now["step"]:
        raise ValueError(
            f"max_steps: expected at least the {now['step']} steps that the run has taken, got "
            f"{steps}"
        )
    return taken


def _differences(before: Start, now: Start) -> Iterator[tuple[str, str]]:
    """Yield the keys that differ, each with `old -> new`."""
    if before["stage"] != now["stage"]:
        yield "stage", f"{before['stage']} -> {now['stage']}"
    old, new = before["recipe"], now["recipe"]
    for key in [key for key in new if key in old]:  # another version may have other keys
        if key in before["contents"] and key in now["contents"]:
            if before["contents"][key] == now["contents"][key]:
                continue  # perhaps at another path
            if old[key] == new[key]:
                is_gone = now["contents"][key] == new[key]
                problem = "is not there any more" if is_gone else "has changed"
                yield key, f"the content of {new[key]!r:.160} {problem}"
                continue
        if old[key] != new[key]:
            yield key, f"{old[key]!r:.160} -> {new[key]!r:.160}"
    yield from _differences_of_ranks(before, now)


def _differences_of_ranks(before: Start, now: Start) -> Iterator[tuple[str, str]]:
    """Yield a change of the number of prompts per step, or of ranks that reuse completions."""
    ranks = [start["processes"] for start in (before, now)]
    sizes = [start["recipe"]["per_device_train_batch_size"] for start in (before, now)]
    old, new = (size * count for size, count in zip(sizes, ranks, strict=True))
    if ranks[0] != ranks[1]:
        yield "processes", f"{ranks[0]} -> {ranks[1]}"
    if old != new:
        yield "prompts per step", f"{old} -> {new} (per_device_train_batch_size times processes)"
    if ranks[0] != ranks[1] and now["recipe"]["steps_per_rollout"] > 1:
        # Each rank keeps the completions that it reuses in a file of its own.
        yield "processes with steps_per_rollout above 1", f"{ranks[0]} -> {ranks[1]}"


def _content(value: Any) -> Any:
    """Return a hash of the file or folder that a value names, which may be at another path when
    the run resumes; otherwise the value itself.
    """
    if isinstance(value, dict):
        return {name: _content(x) for name, x in value.items()}
    if not isinstance(value, str):
        return value
    if is_server(value):
        return "a server"  # it may be at another address
    source, mark, function = value.partition(".py:")
    path = Path(source + mark.removesuffix(":"))
    try:
        if path.is_file():
            return f"{_hash(path)}{mark and ':'}{function}"
        if path.is_dir():
            files = [f for f in sorted(path.iterdir()) if f.suffix in _MODEL_FILES]
            both = "".join(f"{f.name} {_hash(f)}\n" for f in files)
            return hashlib.sha256(both.encode()).hexdigest()
    except (OSError, ValueError):  # the code that reads it says what is wrong
        pass
    return value


def _hash(path: Path) -> str:
    if (size := path.stat().st_size) > _HASHED:
        return f"{size} bytes"
    with path.open("rb") as file:
        return sha_fileobj(file).hex()

"""Keys that several stages share."""

from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from transformers.distributed import DistributedConfig

from opd_trainer.config.messages import Messages
from opd_trainer.config.values import (
    Conflicts,
    Count,
    NotNegative,
    Positive,
    Steps,
    StrictArguments,
)
from opd_trainer.errors import convert_errors

Dtype = Literal["float32", "bfloat16", "float16"]
_TOKENIZER_OPTIONS = {
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "chat_template", "add_generation_prompt",
    "continue_final_message",
}  # fmt: skip


def _as_text(value: Any) -> Any:
    """Return a date, which YAML makes of 2026-01-31, as the text that it was."""
    return value.isoformat() if isinstance(value, date) else value


Date = Annotated[str, BeforeValidator(_as_text)]


@dataclass
class StageConfig(StrictArguments):
    """The keys of every stage, in addition to those of TrainingArguments.

    A rank takes one optimiser step per batch of `per_device_train_batch_size` prompts: it completes
    them together, then learns from the completions in micro-batches. A model is a path, a hub name,
    a .gguf file, or package:NAME/FILE. Data is a .jsonl, .json, .csv or .parquet file (the texts
    also as .gz), a dataset of the hub such as NAME?split=test&name=main, or
    reasoning_gym:TASK?size=100&seed=1; data.Row lists its columns.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "train_data")

    model: str = field(kw_only=True)  # the student
    train_data: str = field(kw_only=True)  # prompts to learn on
    eval_data: str | None = None  # held-out prompts
    # Scores a completion: exact_match, math_verify, reasoning_gym, or a function(text, row) given
    # as file.py:function or module:function.
    scorer: str | None = None
    # Regular expression with one group; the scorer gets the group of the last match, by default the
    # whole completion.
    answer_pattern: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template
    dtype: Dtype = "float32"  # of the weights
    trust_remote_code: bool = False  # run a model's own Python code
    # Splits all models over the ranks, with options of transformers' DistributedConfig:
    # {fsdp_size: 8}, {tp_size: 2, fsdp_size: 4}, ...; by default each rank holds all of them (DDP).
    distributed_config: dict[str, Any] | None = None
    lora_r: Annotated[int, Field(ge=0)] = 0  # rank of the student's adapters; 0 trains all weights
    lora_alpha: Count = 32  # the adapters are scaled by lora_alpha / lora_r
    lora_target_modules: str | list[str] = "all-linear"
    temperature: Positive = 1.0  # of the loss, and of sampling unless sampling_temperature is set
    sampling_temperature: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Count = 128  # tokens
    completions_per_prompt: Count = 1  # in training
    steps_per_rollout: Count = 1  # optimiser steps on the same completions
    rollout_engine: Literal["transformers", "vllm"] = "transformers"
    rollout_batch_size: Count = 64  # completions that are sampled together
    micro_batch_size: Count = 8  # completions per forward and backward pass
    # Tokens per forward and backward pass, including prompts and padding.
    micro_batch_tokens: Count | None = None
    aggregation: Literal["token", "sequence"] = "token"  # what the loss averages over
    # Steps without a finite gradient are skipped; more than this number in a row stop the run.
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20
    skip_truncated: bool = False  # no loss on completions that reach max_completion_length
    eval_completions_per_prompt: Count = 1  # above 1, pass@k is logged too
    eval_greedy: bool = False  # decode held-out completions greedily instead of sampling
    per_device_train_batch_size: Count = 16  # prompts of a step, on each rank
    per_device_eval_batch_size: Count = 16  # completions that are measured together
    learning_rate: Positive = 1e-5
    logging_steps: Steps = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = False
    eval_on_start: bool = True  # measure the held-out prompts before training too
    preflight: bool = True  # report before training: memory, disk, and how much there is to learn
    use_cache: bool = True  # in the config of the saved student
    # Of the student's weights at the end of the run, by default as in the files of `model`;
    # checkpoints keep `dtype`.
    save_dtype: Dtype | None = None
    # auto: from the newest whole checkpoint in output_dir, or from the start if there is none.
    resume_from_checkpoint: Literal["auto"] | None = None
    # Names of the data's columns that are called otherwise: {prompt: question, answer: solution}.
    columns: dict[str, str] = field(default_factory=dict)
    # drop leaves out rows that cannot be used, such as malformed or overlong ones, and prints their
    # number and the first of them.
    on_bad_row: Literal["error", "drop"] = "error"
    # Replaces the student's chat template, and is saved with it: a file with a Jinja template, or
    # the model that has it.
    chat_template: str | None = None
    # The date that templates write which ask for one, such as 2026-01-31; default the day that the
    # run began, also when it resumes.
    chat_template_date: Date | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # transformers cannot save the optimiser of models that it splits while loading them.
        self.save_only_model |= bool(self.distributed_config)

    @property
    def samples_differ(self) -> bool:
        """Whether samples come from another distribution than the loss is computed for."""
        return self.top_p < 1 or self.sampling_temperature not in (None, self.temperature)

    def _conflicts(self) -> Conflicts:
        """Return conditions on several keys that make the config invalid, with their messages."""
        is_split = bool(self.distributed_config)
        expected = "distributed_config: expected options such as fsdp_size and tp_size"
        with convert_errors(f"{expected}, got {self.distributed_config}"):
            sizes = DistributedConfig(**self.distributed_config or {})  # each is 1 by default
        ranks = sizes.tp_size * sizes.dp_size * sizes.pp_size
        reserved = ", ".join(_TOKENIZER_OPTIONS & self.chat_template_kwargs.keys())
        return [*super()._conflicts(),
            (self.dtype != "float32" and self.lora_r == 0 and "train_data" in self.REQUIRED,
             "dtype: expected float32 to train all weights, because 16 bits round small updates "
             "away; for speed set bf16: true, or lora_r"),
            (self.gradient_accumulation_steps != 1,
             "gradient_accumulation_steps: expected 1, because a batch of prompts is one step; "
             "split it to save memory by micro_batch_size"),
            (self.eval_greedy and self.eval_completions_per_prompt > 1,
             "eval_completions_per_prompt: expected 1 with eval_greedy: all would be the same"),
            (self.eval_strategy != "no" and self.eval_data is None,
             f"eval_strategy: expected eval_data with {self.eval_strategy.value!r}"),
            (bool(reserved),
             f"chat_template_kwargs: expected variables of the template, got {reserved}"),
            (not _is_date(self.chat_template_date),
             "chat_template_date: expected a date such as 2026-01-31, got "
             f"{self.chat_template_date!r}"),
            (bool(self.hub_token),
             "hub_token: expected none, because a run saves its recipe; set HF_TOKEN in the "
             "environment"),
            (self.save_strategy == "best",
             "save_strategy: expected no, steps or epoch; pick a checkpoint by its step"),
            (self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
             "lr_scheduler_type: expected one that does not follow a metric, because stages log "
             f"several, got {self.lr_scheduler_type.value}"),
            (is_split and ranks != self.world_size,
             f"distributed_config: expected sizes whose product is {self.world_size}, the number "
             f"of processes, got {ranks}; start as many by torchrun --nproc-per-node"),
            (sizes.pp_size > 1,
             "distributed_config: expected no pp_size, because the loss needs all layers on a "
             "rank; use fsdp_size and tp_size"),
            (self.lora_r > 0 and sizes.tp_size > 1,
             "lora_r: expected 0 with tp_size, which cannot split adapters; use fsdp_size"),
            (is_split and self.rollout_engine == "vllm",
             "rollout_engine: expected transformers with distributed_config, because vLLM cannot "
             "take weights that are split over ranks"),
            (is_split and bool(self.resume_from_checkpoint),
             "resume_from_checkpoint: not possible with distributed_config, whose checkpoints hold "
             "the model only; to resume, split by accelerate launch --use_fsdp instead"),
            (self.save_only_model and bool(self.resume_from_checkpoint),
             "resume_from_checkpoint: not possible with save_only_model, whose checkpoints hold no "
             "state of the optimiser"),
            (self.n_gpu > 1, "several GPUs: start one process per GPU by torchrun"),
        ]  # fmt: skip


@dataclass
class TeacherConfig(StageConfig):
    """The keys of stages that can have a teacher."""

    # A model; "self", the student's initial weights; http(s)://HOST/v1, a server (see
    # models/server.py); or {name: model, ...}, where each row names its own in a column `teacher`.
    teacher: str | dict[str, str] | None = None
    teacher_dtype: Dtype | None = None  # of the teachers' weights; default dtype
    # Messages that only the teacher sees; a text becomes a system message, and {{ column }} is
    # replaced by the row's value.
    privileged_context: str | Messages | None = None
    k: Count = 20  # of the top-K, in loss and measurements
    teacher_model: str | None = None  # name of a server's model; default its first
    teacher_concurrency: Count = 32  # parallel requests to a server
    teacher_timeout: Positive = 120.0  # seconds per request
    teacher_patience: NotNegative = 600.0  # seconds to keep trying while a server is away
    # The chat template that teachers read. own: that of their tokenizer, if it has one, else the
    # student's; a server does not tell its own, so it reads the student's. Or student, or a file
    # with a Jinja template, or the model that has it.
    teacher_chat_template: str = "own"
    # Variables of the teachers' chat template; default chat_template_kwargs.
    teacher_chat_template_kwargs: dict[str, Any] | None = None

    @property
    def teachers(self) -> dict[str, str]:
        """The teachers by the name that rows use; a single teacher is named ""."""
        if self.teacher is None:
            return {}
        return self.teacher if isinstance(self.teacher, dict) else {"": self.teacher}

    @property
    def has_server(self) -> bool:
        """Whether one of the teachers is a server."""
        return any(is_server(x) for x in self.teachers.values())

    def _conflicts(self) -> Conflicts:
        variables = self.teacher_chat_template_kwargs or {}
        reserved = ", ".join(_TOKENIZER_OPTIONS & variables.keys())
        return [*super()._conflicts(),
            (bool(reserved),
             f"teacher_chat_template_kwargs: expected variables of the template, got {reserved}"),
            (isinstance(self.teacher, dict) and not self.teacher,
             "teacher: expected at least one name: model"),
            (isinstance(self.teacher, dict) and "self" in self.teacher.values(),
             "teacher: self cannot be one of several; name the model"),
            (any(is_server(x) and set("@?#") & set(x) for x in self.teachers.values()),
             "teacher: expected a URL without credentials; set the key in the environment"),
            (self.has_server and self.temperature != 1,
             "temperature: expected 1 with a server, which returns log-probs at temperature 1"),
            (self.teacher == "self" and self.lora_r > 0 and self.teacher_dtype is not None,
             "teacher_dtype: expected none under lora_r, where the teacher is the student's base"),
        ]  # fmt: skip


def is_server(teacher: str) -> bool:
    """Return whether a teacher is the URL of a server, not a model to load."""
    return teacher.startswith(("http://", "https://"))


def _is_date(text: str | None) -> bool:
    """Return whether a text is an ISO date, or None."""
    try:
        return text is None or bool(datetime.fromisoformat(text))
    except ValueError:
        return False

"""What a recipe may say: one flat dataclass for each stage."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from transformers.distributed import DistributedConfig

from trainer.config.arguments import StrictArguments
from trainer.config.values import Count, Messages, NotNegative, Positive, Steps

Dtype = Literal["float32", "bfloat16", "float16"]
Refusals = list[tuple[bool, str]]
_OF_TOKENIZER = {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
                 "return_assistant_tokens_mask", "tokenizer_kwargs"}  # fmt: skip


@dataclass
class StageConfig(StrictArguments):
    """What every stage has, beside everything in TrainingArguments.

    A batch of the dataloader, `per_device_train_batch_size` prompts, is one optimiser step of a
    rank: completed together, then learned in micro-batches. Models are named by a path, hub name,
    .gguf file, or package:NAME/FILE. Data is a .jsonl or .parquet file, a dataset of the hub such
    as NAME?split=test&name=main, or reasoning_gym:TASK?size=100&seed=1, with the columns of
    data.Row.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "train_data")

    model: str = field(kw_only=True)  # the student
    train_data: str = field(kw_only=True)
    eval_data: str | None = None
    # Of a completion and its row: exact_match, math_verify, reasoning_gym, or a function(text, row)
    # of file.py:function or module:function.
    scorer: str | None = None
    answer_pattern: str | None = None  # what is scored: its last match's group, else everything
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float32"
    trust_remote_code: bool = False  # run the Python code that a model comes with
    # How all models are split over the ranks, as transformers' DistributedConfig: {fsdp_size: 8},
    # {tp_size: 2, fsdp_size: 4}, ...; default each rank has them whole (DDP).
    distributed_config: dict[str, Any] | None = None
    lora_r: Annotated[int, Field(ge=0)] = 0  # rank of adapters on the student; 0 trains all weights
    lora_alpha: Count = 32
    lora_target_modules: str | list[str] = "all-linear"
    temperature: Positive = 1.0  # of the loss, and of samples where they have none of their own
    sampling_temperature: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Count = 128
    completions_per_prompt: Count = 1  # in training
    steps_per_rollout: Count = 1  # optimiser steps on the same completions
    rollout_engine: Literal["transformers", "vllm"] = "transformers"
    rollout_batch_size: Count = 64  # completions sampled at a time
    micro_batch_size: Count = 8  # completions that are learned from at a time, ...
    micro_batch_tokens: Count | None = None  # ... and their tokens, with contexts and padding
    aggregation: Literal["token", "sequence"] = "token"  # what has the same weight
    # That many steps in a row may have no finite gradient, which are left out, before a run stops.
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20
    skip_truncated: bool = False  # no loss on completions that did not end
    eval_completions_per_prompt: Count = 1  # above 1, scores come with pass@k
    eval_greedy: bool = False  # held-out completions are the likeliest, not samples
    per_device_train_batch_size: Count = 16
    per_device_eval_batch_size: Count = 16
    learning_rate: NotNegative = 1e-5
    logging_steps: Steps = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = False
    eval_on_start: bool = True
    preflight: bool = True  # tell before training whether it fits and has something to learn
    use_cache: bool = True  # of the saved student
    # From output_dir's newest whole checkpoint; from the start where there is none yet.
    resume_from_checkpoint: Literal["auto"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # transformers cannot save the optimiser of models that are split as they load.
        self.save_only_model |= bool(self.distributed_config)
        for wrong, message in self._refusals():
            if wrong:
                raise ValueError(message)

    @property
    def uses_references(self) -> bool:
        """Whether it learns from completions that the data has."""
        return False

    @property
    def _split(self) -> DistributedConfig:
        """Whose sizes are 1 by default."""
        try:
            return DistributedConfig(**self.distributed_config or {})
        except (TypeError, ValueError) as error:
            raise ValueError(
                "distributed_config: expected options of transformers' DistributedConfig, such as "
                f"fsdp_size and tp_size, got {self.distributed_config}: {error}"
            ) from None

    def _refusals(self) -> Refusals:
        """What does not go together, or would teach nothing, and why."""
        split = self._split
        ranks = split.tp_size * split.dp_size * split.pp_size
        return [
            (self.dtype != "float32" and self.lora_r == 0 and "train_data" in self.REQUIRED,
             "dtype: expected float32 to train all weights, since 16 bits round their updates "
             "away; for speed use bf16: true, or lora_r"),
            (self.gradient_accumulation_steps != 1,
             "gradient_accumulation_steps: expected 1, as a batch of prompts is one step; split it "
             "in memory by micro_batch_size"),
            (self.eval_greedy and self.eval_completions_per_prompt > 1,
             "eval_completions_per_prompt: expected 1 with eval_greedy, whose completions are all "
             "the same"),
            (bool(ours := _OF_TOKENIZER & self.chat_template_kwargs.keys()),
             f"chat_template_kwargs: expected what the template has, got {', '.join(ours)}"),
            (bool(self.hub_token),
             "hub_token: expected none, as recipes are kept with the run; set HF_TOKEN in the "
             "environment"),
            (self.save_strategy == "best",
             "save_strategy: expected no, steps or epoch; pick a checkpoint by its step"),
            (self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
             "lr_scheduler_type: expected one that does not follow a metric, which stages have "
             f"several of, got {self.lr_scheduler_type.value}"),
            (bool(self.distributed_config) and ranks != self.world_size,
             f"distributed_config: expected sizes whose product is {self.world_size}, as there are "
             f"processes, got {ranks}; start as many by torchrun --nproc-per-node"),
            (split.pp_size > 1,
             "distributed_config: expected no pp_size: a loss inside the forward pass needs all "
             "layers on a rank; use fsdp_size and tp_size"),
            (self.lora_r > 0 and split.tp_size > 1,
             "lora_r: expected 0 with tp_size: adapters of layers that are split by tensor "
             "parallelism are not supported; use fsdp_size"),
            (bool(self.distributed_config) and self.rollout_engine == "vllm",
             "rollout_engine: expected transformers with distributed_config: vLLM cannot take "
             "weights that are split over ranks"),
            (bool(self.distributed_config) and bool(self.resume_from_checkpoint),
             "resume_from_checkpoint: not possible with distributed_config, whose checkpoints hold "
             "the model alone; runs that resume are split by accelerate launch --use_fsdp"),
            (self.n_gpu > 1, "several GPUs: start one process for each by torchrun"),
        ]  # fmt: skip

    @property
    def samples_differ(self) -> bool:
        """Whether completions come from another distribution than the one that the loss is of."""
        return self.top_p < 1 or self.sampling_temperature not in (None, self.temperature)


@dataclass
class TeacherConfig(StageConfig):
    """A stage with a teacher."""

    # "self" is the student's initial weights. Several models are {name: model}, where each row
    # names its own in a column `teacher`. http(s)://HOST/v1 is a server, see server.py.
    teacher: str | dict[str, str] | None = None
    teacher_dtype: Dtype | None = None
    # A system message, or messages, for the teacher only; {{ column }} stands for the row's.
    privileged_context: str | Messages | None = None
    k: Count = 20  # of the top-K, in loss and measurements
    teacher_model: str | None = None  # a server's name for it; default its first
    teacher_concurrency: Count = 32  # requests at a time
    teacher_timeout: Positive = 120.0  # seconds for a request
    teacher_patience: NotNegative = 600.0  # seconds that a server may be away

    @property
    def teachers(self) -> dict[str, str]:
        """The teachers by the name that rows have for them; a single one has none."""
        if self.teacher is None:
            return {}
        return self.teacher if isinstance(self.teacher, dict) else {"": self.teacher}

    @property
    def servers(self) -> list[str]:
        """The teachers that are endpoints."""
        return [x for x in self.teachers.values() if is_server(x)]

    def _refusals(self) -> Refusals:
        return [*super()._refusals(),
            (isinstance(self.teacher, dict) and not self.teacher,
             "teacher: expected at least one name: model"),
            (isinstance(self.teacher, dict) and "self" in self.teacher.values(),
             "teacher: self cannot be one of several; name the model"),
            (any(set("@?#") & set(x) for x in self.servers),
             "teacher: expected a URL without credentials; a key goes into the environment"),
            (bool(self.servers) and self.temperature != 1,
             "temperature: expected 1 with a server, whose log-probs are of temperature 1"),
            (self.teacher == "self" and self.lora_r > 0 and self.teacher_dtype is not None,
             "teacher_dtype: expected none under lora_r, where the teacher is the student's base"),
        ]  # fmt: skip


def is_server(teacher: str) -> bool:
    """Whether a teacher is an endpoint and not a model to load."""
    return teacher.startswith(("http://", "https://"))

"""The recipe: one flat dataclass, from a YAML file and the command line."""

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from transformers import TrainingArguments

Messages = list[dict[str, str]]
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]


@dataclass
class DistillationConfig(TrainingArguments):
    """What to distil, into what, on which prompts and how; beside everything in TrainingArguments.

    One batch of the dataloader is one optimiser step of a rank: `per_device_train_batch_size`
    prompts are rolled out together, then learned in micro-batches of `micro_batch_size`.

    Args:
        model: student: a path, a hub name, a .gguf file, or package:NAME/FILE in an installed package.
        teacher: a model named likewise, or "self": the student's initial weights.
        privileged_context: what the teacher sees before every prompt and the student never does: a
            system message, or a list of messages. A column of that name in the data overrides it.
        train_data, eval_data: a .jsonl or .parquet file, or a hub name, with a column `prompt` (a
            string or messages).
        objective, stop_gradient, tail, beta, k, support: as in opd_kernels; beta is jsd's.
        aggregation: "token" weighs every token alike, "sequence" every completion.
        temperature: of sampling and of the loss: they must agree for samples to be on-policy.
        scorer: file.py:function, from a completion's text to a number; its mean over the student's
            held-out completions is logged.
        lora_r: rank of LoRA adapters on the student; 0 trains all weights.
    """

    model: str = field(kw_only=True)
    train_data: str = field(kw_only=True)
    eval_data: str | None = None
    teacher: str = "self"
    privileged_context: str | Messages | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float32"
    teacher_dtype: Dtype | None = None

    objective: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    stop_gradient: bool = True
    tail: Literal["drop", "bucket", "renormalize"] = "drop"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    k: Count = 20
    support: Literal["student", "teacher", "union", "intersection", "full"] = "student"
    aggregation: Literal["token", "sequence"] = "token"

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_length: Count = 128
    micro_batch_size: Count = 8
    scorer: str | None = None

    lora_r: Annotated[int, Field(ge=0)] = 0
    lora_alpha: Count = 32
    lora_target_modules: str | list[str] = "all-linear"

    per_device_train_batch_size: Count = 16
    per_device_eval_batch_size: Count = 16
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    logging_steps: Annotated[float, Field(gt=0)] = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        hints = get_type_hints(DistillationConfig, include_extras=True)
        for name in DistillationConfig.__annotations__:
            try:
                value = TypeAdapter(hints[name]).validate_python(getattr(self, name))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].lower()
                raise ValueError(f"{name}: {reason}, got {getattr(self, name)!r}") from None
            setattr(self, name, value)
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps: expected 1, since a batch of prompts is one optimiser "
                f"step, got {self.gradient_accumulation_steps}; set per_device_train_batch_size to the "
                "prompts of a step, and micro_batch_size to what fits in memory"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: expected false; take a checkpoint by its step"
            )
        if self.tail == "renormalize" and self.k < 2:
            raise ValueError(
                "k: expected at least 2 with tail: renormalize, got 1; it has no gradient"
            )
        self.eval_on_start = self.eval_on_start or self.eval_data is not None
        super().__post_init__()


class _Yaml12Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-5 as a number, as YAML 1.2 does."""


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(recipe: Path, overrides: list[str]) -> DistillationConfig:
    """The config of a recipe file with `--key value` pairs on top.

    Raises:
        ValueError: an unknown or missing key, or an unfit value; it names the key and the remedy.
    """
    if not recipe.is_file():
        raise ValueError(f"recipe: expected a YAML file, got {recipe}; see recipes/ for examples")
    try:
        values = yaml.load(recipe.read_text(), _Yaml12Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {recipe} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    if len(overrides) % 2 or not all(key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"expected pairs of `--key value` after the recipe, got {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        values[key.removeprefix("--")] = yaml.load(value, _Yaml12Loader)
    known = {f.name for f in fields(DistillationConfig) if f.init}
    for key in values.keys() - known:
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{key}: unknown key; did you mean {close[0] if close else 'another'!r}?")
    for key in ("model", "train_data"):
        if key not in values:
            raise ValueError(f"{key}: missing; set it in {recipe} or pass --{key}")
    return DistillationConfig(**values)

"""The recipe: one flat dataclass, from a YAML file and the command line."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from transformers import TrainingArguments

Messages = list[Annotated[dict[Literal["role", "content"], str], Field(min_length=2)]]
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class DistillationConfig(TrainingArguments):
    """What to distil, into what, on which prompts and how; beside everything in TrainingArguments.

    A batch of the dataloader, `per_device_train_batch_size` prompts, is one optimiser step of a
    rank: rolled out together, then learned in micro-batches. Models are named by a path, hub name,
    .gguf file, or package:NAME/FILE. Data is a .jsonl or .parquet file or a hub name, with a column
    `prompt` (a string or messages), and `privileged_context` where rows have their own.
    """

    model: str = field(kw_only=True)  # the student
    teacher: str = "self"  # another model, or the student's initial weights
    # Of the way to the student's weights that a self-teacher goes after each step: 0 stays, 1 is
    # the student as it is, what lies between is an exponential moving average in float32.
    teacher_update_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    privileged_context: str | Messages | None = None  # system message or messages, teacher only
    train_data: str = field(kw_only=True)
    eval_data: str | None = None
    scorer: str | None = None  # file.py:function, of a held-out completion's text to a number
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "float32"
    teacher_dtype: Dtype | None = None
    lora_r: Annotated[int, Field(ge=0)] = 0  # rank of adapters on the student; 0 trains all weights
    lora_alpha: Count = 32
    lora_target_modules: str | list[str] = "all-linear"
    objective: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = "reverse_kl"
    stop_gradient: bool = True
    tail: Literal["drop", "bucket", "renormalize"] = "drop"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # jsd's
    k: Count = 20
    support: Literal["student", "teacher", "union", "intersection", "full"] = "student"
    forward_kl_coef: Annotated[float, Field(ge=0)] = 0.0  # of forward KL, added to reverse_kl ...
    forward_kl_min_entropy: float = 0.0  # ... on tokens where the teacher's entropy (nats) exceeds
    max_token_loss: Annotated[float, Field(gt=0)] | None = None  # nats; above it no gradient
    max_loss_tokens: Count | None = None  # of each completion, from its start
    skip_truncated: bool = False  # no loss on completions that did not end
    aggregation: Literal["token", "sequence"] = "token"  # what has the same weight
    temperature: Temperature = 1.0  # of the loss, and of samples where they have none of their own
    sampling_temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    completions_per_prompt: Count = 1  # in training
    max_completion_length: Count = 128
    micro_batch_size: Count = 8
    per_device_train_batch_size: Count = 16
    per_device_eval_batch_size: Count = 16
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    logging_steps: Annotated[float, Field(gt=0)] = 1
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = False
    eval_on_start: bool = True
    use_cache: bool = True  # of the saved student
    resume_from_checkpoint: Literal["auto"] | None = None  # from output_dir's newest checkpoint

    def __post_init__(self) -> None:
        hints = get_type_hints(DistillationConfig, include_extras=True)
        for name in [f.name for f in fields(self) if f.init]:
            value = getattr(self, name)
            # YAML reads 3e-5 as a string, which is a number where the field is one.
            try:
                if name in DistillationConfig.__annotations__ or isinstance(value, str):
                    setattr(self, name, TypeAdapter(hints[name]).validate_python(value))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].lower()
                raise ValueError(f"{name}: {reason}, got {value!r}") from None
        super().__post_init__()
        for wrong, message in self._refusals():
            if wrong:
                raise ValueError(message)

    def _refusals(self) -> list[tuple[bool, str]]:
        """What does not go together, or would teach nothing, and why."""
        best = self.load_best_model_at_end or self.metric_for_best_model
        is_sampled, is_reverse = (self.objective == x for x in ("policy_gradient", "reverse_kl"))
        shaped = (self.support, self.tail, self.stop_gradient, self.max_token_loss)
        rate, averages = self.teacher_update_rate, 0 < self.teacher_update_rate < 1
        return [
            (is_sampled and self.samples_differ,
             "objective: policy_gradient is unbiased only for samples from the model's own "
             "distribution; expected top_p: 1 and no sampling_temperature"),
            (is_sampled and shaped != ("student", "drop", True, None),
             "objective: policy_gradient takes the sampled token alone: it has no support, tail, "
             "stop_gradient or max_token_loss; leave these keys out"),
            (self.forward_kl_coef > 0 and not is_reverse,
             "forward_kl_coef: it is added to objective: reverse_kl alone"),
            (not self.stop_gradient and not (is_reverse and self.tail == "drop"),
             "stop_gradient: only reverse_kl has one; false changes nothing here"),
            (self.tail == "renormalize" and self.k < 2,
             "k: expected at least 2 with tail: renormalize"),
            (rate > 0 and self.teacher != "self",
             "teacher_update_rate: expected 0 for a teacher that is another model"),
            (averages and self.lora_r > 0,
             "teacher_update_rate: expected 0 (the base) or 1 (with the adapters) under lora_r"),
            (averages and self.teacher_dtype not in (None, "float32"),
             "teacher_dtype: expected float32 for an average of weights, whose small steps 16 bits "
             "round away"),
            (self.dtype != "float32" and self.lora_r == 0,
             "dtype: expected float32 to train all weights, since 16 bits round their updates "
             "away; for speed use bf16: true, or lora_r"),
            (self.gradient_accumulation_steps != 1,
             "gradient_accumulation_steps: expected 1, as a batch of prompts is one step; split it "
             "in memory by micro_batch_size"),
            (bool(best), "metric_for_best_model: not supported; pick a checkpoint by its step"),
            (self.n_gpu > 1, "several GPUs: start one process for each by torchrun"),
        ]  # fmt: skip

    @property
    def samples_differ(self) -> bool:
        """Whether completions come from another distribution than the one that the loss is of."""
        return self.top_p < 1 or self.sampling_temperature not in (None, self.temperature)


def load_config(recipe: Path, overrides: list[str]) -> DistillationConfig:
    """The config of a recipe file with `--key value` pairs on top; a bad key raises ValueError."""
    values = yaml.safe_load(recipe.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    if len(overrides) % 2 or not all(key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"expected `--key value` pairs after the recipe, got {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        values[key.removeprefix("--")] = yaml.safe_load(value)
    known = {f.name for f in fields(DistillationConfig) if f.init}
    for key in sorted(values.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{key}: unknown key; did you mean {close[0] if close else 'another'!r}?")
    for key in sorted({"model", "train_data"} - values.keys()):
        raise ValueError(f"{key}: missing; set it in {recipe} or pass --{key}")
    return DistillationConfig(**values)

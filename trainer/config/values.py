"""The values that keys may have: types for pydantic, and TrainingArguments that are checked."""

from dataclasses import dataclass, fields
from enum import Enum
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, with_config
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from opd_trainer.recipe import check_value

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]  # below 1: share of a run


def _without_nulls(message: Any) -> Any:
    """Drop null entries: a table has them for keys that only other rows use."""
    kept = isinstance(message, dict) and {k: v for k, v in message.items() if v is not None}
    return kept or message


@with_config(ConfigDict(extra="forbid"))
class Message(TypedDict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


Messages = list[Annotated[Message, BeforeValidator(_without_nulls)]]


def _refused(remedy: str) -> Any:
    """Return the type of a key that must stay empty."""

    def refuse(value: Any) -> Any:
        if value:
            raise ValueError(f"not supported; {remedy}")
        return value

    return Annotated[Any, BeforeValidator(refuse)]


def _one_of(choices: Any) -> Any:
    return Literal.__getitem__(tuple(choices))


_Decay = Annotated[float, Field(ge=0, lt=1)]
_Options = dict[str, Any] | None
_LOGGERS = tuple(INTEGRATION_TO_CALLBACK)
_USE_SPLIT = "split models by distributed_config, or by accelerate launch --use_fsdp"
_NumpySeed = Annotated[int, Field(ge=0, lt=2**32)]

# transformers annotates these keys too loosely: it accepts -1 as a number of steps, 2 as a decay or
# a misspelt `report_to`, and the run trains wrongly without an error, or fails late in code that
# does not name the key. So this table has a stricter type for each key that accepts meaningless
# values, and refuses the keys that contradict a stage; all other keys keep their annotation.
# tests/trainer/test_bad_recipes.py derives wrong values from every field: it shows that a line is
# needed, and fails when a new version of transformers adds a key that needs one.
_KEYS_BY_TYPE: list[tuple[Any, str]] = [
    (Positive, "num_train_epochs adam_epsilon"),
    (NotNegative, "weight_decay max_grad_norm eval_delay"),
    (NotNegative | None, "neftune_noise_alpha"),
    (_Decay, "adam_beta1 adam_beta2"),
    (_Decay | Count, "warmup_steps"),
    (Literal[-1] | Count, "max_steps"),
    (Steps, "save_steps"),
    (Steps | None, "eval_steps"),
    (Count, "gradient_accumulation_steps ddp_timeout"),
    (Count | None, "save_total_limit eval_accumulation_steps torch_empty_cache_steps"),
    (Count | None, "dataloader_prefetch_factor ddp_bucket_cap_mb"),
    (Annotated[int, Field(ge=0)], "dataloader_num_workers"),
    (Annotated[int, Field(ge=-1)], "local_rank"),
    (_NumpySeed, "seed"),
    (_NumpySeed | None, "data_seed"),
    (_Options, "lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs"),
    (dict[_one_of(f.name for f in fields(AcceleratorConfig)), Any] | None, "accelerator_config"),  # type: ignore[misc]
    (_one_of(["", *(x.value for x in DebugOption)]) | list[DebugOption], "debug"),
    (_one_of(["all", "none", *_LOGGERS]) | list[_one_of(_LOGGERS)] | None, "report_to"),  # type: ignore[misc]
    (Literal["all", "non_padding", "no"] | bool, "include_num_input_tokens_seen"),
    (_refused(_USE_SPLIT), "fsdp fsdp_config deepspeed parallelism_config"),
    (_refused("leave it out"), "torch_compile torch_compile_backend torch_compile_mode"),
    (_refused("leave it out"), "label_smoothing_factor"),
    (_refused("pick a checkpoint by its step"), "load_best_model_at_end metric_for_best_model"),
]
_TYPES = {key: kind for kind, keys in _KEYS_BY_TYPE for key in keys.split()}


@dataclass
class StrictArguments(TrainingArguments):
    """TrainingArguments that raise ValueError for a value that does not fit its key."""

    def __post_init__(self) -> None:
        for f in [f for f in fields(self) if f.init]:
            if (value := getattr(self, f.name)) is not f.default:
                setattr(self, f.name, self._checked(f.name, value))
        super().__post_init__()

    def _checked(self, key: str, value: Any) -> Any:
        if key.endswith("_strategy") and value is False:  # YAML reads a bare `no` as false
            value = "no"
        # mypy confuses the hash of a class with that of its instances.
        return check_value(key, _validators(type(self))[key], value)  # type: ignore[arg-type]


@cache
def _validators(config: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """Return the validator of each key."""
    hints, validators = get_type_hints(config, include_extras=True) | _TYPES, {}
    for f in [f for f in fields(config) if f.init]:
        kind, members = hints[f.name], get_args(hints[f.name])
        if any(isinstance(x, type) and issubclass(x, Enum) for x in members):  # Enum | str
            kind = reduce(or_, (x for x in members if x is not str))
        elif "choices" in f.metadata:
            kind = _one_of([*f.metadata["choices"], f.default])
        validators[f.name] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    return validators

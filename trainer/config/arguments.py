"""transformers' TrainingArguments, whose every key must be of its type and of a value that makes
sense: there a wrong one is often taken as it is, and trains wrong in silence.
"""

from dataclasses import dataclass, fields
from enum import Enum
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig

from trainer.config.values import Count, NotNegative, Positive, Steps, reason


def _none(remedy: str) -> Any:
    """The type of a key that has no meaning here."""

    def refuse(value: Any) -> Any:
        if value:
            raise ValueError(f"not supported; {remedy}")
        return value

    return Annotated[Any, AfterValidator(refuse)]


def _one_of(choices: Any) -> Any:
    return Literal.__getitem__(tuple(choices))


_Decay = Annotated[float, Field(ge=0, lt=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy's
_SPLIT = "split models by distributed_config, or by accelerate launch --use_fsdp"
_TYPES: dict[str, Any] = {
    "num_train_epochs": Positive,
    "max_steps": Literal[-1] | Count,
    "warmup_steps": Annotated[float, Field(ge=0, lt=1)] | Count,
    "adam_beta1": _Decay,
    "adam_beta2": _Decay,
    "adam_epsilon": Positive,
    "local_rank": Annotated[int, Field(ge=-1)],
    "seed": _Seed,
    "data_seed": _Seed | None,
    "debug": _one_of(["", *(x.value for x in DebugOption)]) | list[DebugOption],
    "report_to": _one_of(["all", "none", *INTEGRATION_TO_CALLBACK])
    | list[_one_of(INTEGRATION_TO_CALLBACK)] | None,  # type: ignore[misc]
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "accelerator_config": dict[_one_of(f.name for f in fields(AcceleratorConfig)), Any] | None,  # type: ignore[misc]
    **dict.fromkeys(("weight_decay", "max_grad_norm", "eval_delay"), NotNegative),
    "neftune_noise_alpha": NotNegative | None,
    "save_steps": Steps,
    "eval_steps": Steps | None,
    **dict.fromkeys(("gradient_accumulation_steps", "ddp_timeout"), Count),
    **dict.fromkeys(
        ("save_total_limit", "eval_accumulation_steps", "torch_empty_cache_steps",
         "dataloader_prefetch_factor", "ddp_bucket_cap_mb"), Count | None),
    "dataloader_num_workers": Annotated[int, Field(ge=0)],
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        dict[str, Any] | None),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _none(_SPLIT)),
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode", "label_smoothing_factor"),
        _none("leave it out")),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model"),
        _none("pick a checkpoint by its step")),
}  # fmt: skip


@dataclass
class StrictArguments(TrainingArguments):
    """TrainingArguments that raise ValueError for a value that is not of its key's type."""

    def __post_init__(self) -> None:
        for f in [f for f in fields(self) if f.init]:
            if (value := getattr(self, f.name)) is not f.default:
                setattr(self, f.name, self._checked(f.name, value))
        super().__post_init__()

    def _checked(self, name: str, value: Any) -> Any:
        if name.endswith("_strategy") and value is False:  # as YAML reads a bare no
            value = "no"
        try:
            # YAML reads 3e-5 as a string, which is a number where the field is one.
            # mypy takes the hash of a class for that of its instances.
            adapter = _adapters(type(self))[name]  # type: ignore[arg-type]
            checked = adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: {reason(error)}, got {value!r:.80}") from None
        if isinstance(value, bool) > isinstance(checked, bool):
            raise ValueError(f"{name}: input should be a number, got {value}")
        return checked


@cache
def _adapters(arguments: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """What checks each key's value."""
    hints, adapters = get_type_hints(arguments, include_extras=True) | _TYPES, {}
    for f in [f for f in fields(arguments) if f.init]:
        kind, members = hints[f.name], get_args(hints[f.name])
        if any(isinstance(x, type) and issubclass(x, Enum) for x in members):  # Enum | str
            kind = reduce(or_, (x for x in members if x is not str))
        elif "choices" in f.metadata:
            kind = _one_of([*f.metadata["choices"], f.default])
        adapters[f.name] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    return adapters

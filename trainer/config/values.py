"""The values that keys may have: types for pydantic, and TrainingArguments that are checked."""

from dataclasses import dataclass, fields
from enum import Enum
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig

from opd_trainer.command.recipe import check_value

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]  # below 1: share of a run


def _refused(remedy: str, kind: Any = Any, default: Any = None) -> Any:
    """Return the type of a key that must stay empty, or at its default, and of this kind."""

    def refuse(value: Any) -> Any:
        if value != default and (value or default):
            raise ValueError(f"not supported; {remedy}")
        # transformers expects null where such a key is unset.
        return None if kind is Any and value is False else value

    return Annotated[kind, BeforeValidator(refuse)]


def _one_of(choices: Any) -> Any:
    return Literal.__getitem__(tuple(choices))


Conflicts = list[tuple[bool, str]]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Options = dict[str, Any] | None
_LOGGERS = tuple(INTEGRATION_TO_CALLBACK)
_DEBUG = (DebugOption.UNDERFLOW_OVERFLOW.value,)  # the other one is for TPUs
_USE_SPLIT = "split models by distributed_config, or by accelerate launch --use_fsdp"
_OPTIM_ARGUMENTS = {  # of PyTorch's optimisers; transformers ignores other names without an error
    "sgd": "momentum dampening weight_decay nesterov",
    "adagrad": "lr_decay weight_decay eps",
    "rmsprop": "momentum alpha eps weight_decay centered",
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor"), ""),
}
_MEAN = "the loss is a mean over the tokens of all ranks"
_STATE = "use_configured_state"
_METRICS = "a stage has its own held-out metrics"
_LIGER = "Liger would patch the teacher too"
_IN_MEMORY = "prompts are in memory as lists of token ids, and each rank loads its own"
# What a config writes, from which TrainingArguments takes one entry.
_ACCELERATOR = {k: v for k, v in AcceleratorConfig().to_dict().items() if k != _STATE}
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
    (Count | None, "save_total_limit torch_empty_cache_steps"),
    (Count | None, "dataloader_prefetch_factor ddp_bucket_cap_mb"),
    (Annotated[int, Field(ge=0)], "dataloader_num_workers"),
    (_NumpySeed, "seed"),
    (_NumpySeed | None, "data_seed"),
    (_Options, "lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs"),
    (_one_of(["", *_DEBUG]) | list[_one_of(_DEBUG)], "debug"),  # type: ignore[misc]
    (_one_of(["all", "none", *_LOGGERS]) | list[_one_of(_LOGGERS)] | None, "report_to"),  # type: ignore[misc]
    (Literal["all", "non_padding", "no"] | bool, "include_num_input_tokens_seen"),
    (_refused(_USE_SPLIT), "fsdp fsdp_config deepspeed parallelism_config"),
    (_refused("leave it out"), "torch_compile torch_compile_backend torch_compile_mode"),
    (_refused("the loss has no labels"), "label_smoothing_factor"),
    (_refused(_MEAN, bool, True), "average_tokens_across_devices"),
    (_refused("pick a checkpoint by its step"), "load_best_model_at_end metric_for_best_model"),
    (_refused("pick a checkpoint by its step", bool | None), "greater_is_better"),
    (_refused("lower micro_batch_size, which saves memory alone", bool), "auto_find_batch_size"),
    (_refused("set bf16 or fp16, which evaluation follows", bool), "bf16_full_eval fp16_full_eval"),
    (_refused(_METRICS, bool), "prediction_loss_only eval_use_gather_object batch_eval_metrics"),
    (_refused(_METRICS, bool, True), "eval_do_concat_batches"),
    (_refused(_METRICS, Count | None), "eval_accumulation_steps"),
    (_refused(_METRICS, list[str]), "include_for_metrics"),
    (_refused(_METRICS, list[str] | None), "label_names"),
    (_refused(_LIGER, bool), "use_liger_kernel"),
    (_refused(_LIGER, _Options), "liger_kernel_config"),
    (_refused("data.Row lists the columns", bool | None), "remove_unused_columns"),
    (_refused("SIGTERM saves a checkpoint anyway", bool), "enable_jit_checkpoint"),
    (_refused("stages' callbacks have no state", bool), "restore_callback_states_from_checkpoint"),
    (_refused("the command names the stage", bool), "do_train do_predict"),
    (_refused("torchrun sets LOCAL_RANK", int, -1), "local_rank"),
    (_refused(_IN_MEMORY, bool), "dataloader_pin_memory"),
    (_refused(_IN_MEMORY, dict[str, Any] | None, _ACCELERATOR), "accelerator_config"),
    (_refused("prompts must not depend on timing", bool, True), "dataloader_in_order"),
    (_refused("prompts are tokenised already", str, "length"), "length_column_name"),
    (Literal["random", "sequential", "group_by_length"], "train_sampling_strategy"),
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
        for is_wrong, message in self._conflicts():
            if is_wrong:
                raise ValueError(message)

    def _conflicts(self) -> Conflicts:
        """Return conditions on several keys that make the config invalid, with their messages."""
        optim, is_cpu = self.optim.value, self.device.type == "cpu"
        has_workers = self.dataloader_num_workers > 0
        given = {x.partition("=")[0].strip() for x in (self.optim_args or "").split(",") if x}
        known = _OPTIM_ARGUMENTS.get(optim, "").split()
        evaluates, needs_workers = self.eval_strategy != "no", "expected dataloader_num_workers > 0"
        return [
            (optim in ("lomo", "adalomo") or optim.endswith("_layerwise"),
             "optim: expected one that updates after the backward pass, because a step has several "
             f"micro-batches, got {optim}"),
            (bool(self.optim_target_modules) and not optim.startswith(("galore", "apollo")),
             f"optim_target_modules: only galore and apollo have them, got optim: {optim}"),
            (optim in _OPTIM_ARGUMENTS and bool(given.difference(known)),
             f"optim_args: expected {' or '.join(known) or 'none'} with optim: {optim}, got "
             f"{self.optim_args!r}"),
            (bool(self.activation_checkpointing_kwargs) and not self.activation_checkpointing,
             "activation_checkpointing_kwargs: expected activation_checkpointing: true"),
            (self.dataloader_persistent_workers and not has_workers,
             f"dataloader_persistent_workers: {needs_workers}"),
            (self.dataloader_multiprocessing_context is not None and not has_workers,
             f"dataloader_multiprocessing_context: {needs_workers}"),
            (self.eval_steps is not None and self.eval_strategy != "steps",
             f"eval_steps: expected eval_strategy: steps, got {self.eval_strategy.value!r}"),
            (self.do_eval and not evaluates, "do_eval: expected eval_strategy: steps or epoch"),
            (self.eval_delay > 0 and not evaluates,
             "eval_delay: expected eval_strategy: steps or epoch"),
            (self.fp16 and is_cpu, "fp16: it needs a GPU; use bf16 on a CPU"),
            (is_cpu and bool((self.activation_checkpointing_kwargs or {}).get("offload")),
             "activation_checkpointing_kwargs: offload needs a GPU"),
        ]  # fmt: skip

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
        elif "choices" in f.metadata and f.name not in _TYPES:
            kind = _one_of([*f.metadata["choices"], f.default])
        validators[f.name] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    return validators

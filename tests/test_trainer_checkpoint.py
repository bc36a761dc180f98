"""Runs that die and go on."""

import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.tiny_run import read_metrics, write_recipe
from trainer.__main__ import main


def _losses(run):
    steps, _ = read_metrics(run)
    return {line["step"]: line["loss"] for line in steps}


@pytest.mark.parametrize("update_rate", [0.0, 0.3])
def test_a_run_killed_after_a_checkpoint_resumes_with_the_same_losses(tmp_path, update_rate):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "warmup_steps": 2}
    options |= {"teacher_update_rate": update_rate, "eval_strategy": "steps", "eval_steps": 3}
    recipe = write_recipe(tmp_path, **options)
    main(["distill", str(recipe)])
    expected = _losses(tmp_path / "run")
    assert len(set(expected.values())) == 7
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "trainer", "distill", str(recipe), "--output_dir", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = _losses(run)
    assert len(before) < 7
    main(["distill", str(recipe), "--output_dir", str(run), "--resume_from_checkpoint", "auto"])
    resumed = _losses(run)
    assert resumed.keys() == expected.keys()
    assert resumed == pytest.approx(expected, rel=1e-6)
    _, lines = read_metrics(tmp_path / "run")
    _, resumed_lines = read_metrics(run)
    last, resumed_last = (
        [line for line in log if "eval_overlap" in line][-1] for log in (lines, resumed_lines)
    )
    assert resumed_last == pytest.approx(last, rel=1e-5)
    if update_rate > 0:
        teachers = [
            load_file(folder / "checkpoint-6" / "teacher" / "model.safetensors")
            for folder in (tmp_path / "run", run)
        ]
        assert_close(teachers[1], teachers[0], rtol=1e-5, atol=1e-6)
    assert not (run / ".saving").exists() or not any((run / ".saving").iterdir())
    final = [
        load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", run)
    ]
    for name, tensor in final[0].items():
        assert_close(final[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_resuming_from_nothing_says_so(tmp_path):
    recipe = write_recipe(tmp_path)
    for value, reason in (("auto", r"run has no checkpoint; leave it out"), ("x", "'auto'.*'x'")):
        with pytest.raises(SystemExit, match=f"resume_from_checkpoint: .*{reason}"):
            main(["distill", str(recipe), "--resume_from_checkpoint", value])

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


def test_a_run_killed_after_a_checkpoint_resumes_with_the_same_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "warmup_steps": 2}
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

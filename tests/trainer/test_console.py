"""What a run prints: its table of steps, samples and alarms, on a terminal and in a file."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from transformers import TrainerState

from opd_trainer.config import DistillationConfig, RLVRConfig, SFTConfig, load_config
from opd_trainer.measures.diagnostics import alarms
from opd_trainer.run.console import Console, hides_bars
from tests.ranks import run_ranks
from tests.tiny_run import NO_TEACHER, make_trainer, read_metrics, write_recipe

STEP = {"loss": 0.25, "reverse_kl": 0.125, "student_mass": 0.96875, "overlap": 0.5,
        "completion_length": 12.25, "tokens_per_second": 1234.5, "grad_norm": 1.0}  # fmt: skip


@pytest.fixture
def console(tmp_path):
    return Console(load_config(DistillationConfig, write_recipe(tmp_path), []))


def _log(console, logs, step=1, max_steps=4):
    state = TrainerState(global_step=step, max_steps=max_steps)
    console.on_log(None, state, None, logs=logs)


def _columns(output):
    """Return the titles of each header of a table."""
    return [line.split() for line in output.splitlines() if line.split()[:1] == ["step"]]


def test_a_step_is_one_aligned_line(console, capsys):
    _log(console, STEP)
    changes = {
        "loss": -1.5e-5,
        "reverse_kl": float("nan"),
        "overlap": 1.0,
        "tokens_per_second": 9e6,
    }
    _log(console, STEP | changes, step=2)
    _log(console, {"loss": 0.0, "completion_length": 3.0, "tokens_per_second": 7.0}, step=3)
    assert capsys.readouterr().out == (
        " step     loss       KL  overlap     mass   length tokens/s     left\n"
        "  1/4   0.2500   0.1250    0.500    0.969     12.2     1234        -\n"
        "  2/4 -1.5e-05      nan    1.000    0.969     12.2  9000000        -\n"
        "  3/4   0.0000        -        -        -      3.0        7        -\n"
    )


def test_the_time_that_is_left(console, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 190.0])
    monkeypatch.setattr("opd_trainer.run.console.time.monotonic", lambda: next(clock))
    console.on_step_begin(None, TrainerState(global_step=4), None)
    _log(console, STEP, step=5, max_steps=10_000)  # 10 s for a step
    _log(console, STEP, step=9_999, max_steps=10_000)
    _, first, last = capsys.readouterr().out.splitlines()
    assert first.split()[-1] == f"{99_950 // 3600}:{99_950 % 3600 // 60:02}:{99_950 % 60:02}"
    assert last.split()[0] == "9999/10000"
    assert last.split()[-1] == "0:00:00"


def test_a_long_run_repeats_the_header(console, capsys):
    for step in range(1, 101):
        _log(console, STEP, step, max_steps=10_000)
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "loss" in line] == [0, 21, 42, 63, 84]
    assert {len(line) for line in lines} == {74}


def test_alarms_and_evaluations_stand_beside_the_table(console, capsys):
    _log(console, STEP | {"alarm": "First: one.\nSecond: two."})
    _log(console, {"eval_reverse_kl": 0.5, "eval_score": 1.0, "eval_completion_length": 8.5})
    _log(console, STEP, step=2)
    _log(console, {"train_runtime": 3723.4, "train_loss": 1.0}, step=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "alarm: First: one.",
        "alarm: Second: two.",
        "held-out at step 1: KL 0.5, score 1, length 8.5",
    ]
    assert lines[5].split()[0] == "step"
    assert lines[-1] == "2 steps in 1:02:03"


QUIET = {"loss": 1.0, "skipped_steps": 0.0, "student_mass": 0.99}


def test_an_alarm_that_comes_back_is_raised_again_if_it_was_away(tmp_path):
    """A value that moves around a threshold is not reported at each crossing."""
    config = load_config(DistillationConfig, write_recipe(tmp_path, tail=None), [])
    low = {1, 2, 4, 8, 20, 21}
    lines, raised = [], []
    for step in range(30):
        lines.append(QUIET | ({"student_mass": 0.9} if step in low else {}))
        if alarms(config, lines):
            raised.append(step)
        lines.append({"eval_score": 1.0})
    assert raised == [1, 20]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_sample_is_cut_and_cannot_change_the_terminal(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(load_config(DistillationConfig, write_recipe(tmp_path), []))
    prompt = "<user>\n" + "word " * 200 + "<assistant>\n"
    console.print_sample(
        "sample at step 0:", prompt, "\x1b[2J[red]漢字漢字漢字漢字漢字漢字 \ud800\t"
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (7 if width == 40 else 6)
    assert lines[0] == "sample at step 0:"
    assert lines[1].startswith(r"  prompt      <user>\nword word")
    assert lines[3] == "              ..."
    assert lines[4].endswith(r"word <assistant>\n")
    assert lines[5].startswith(r"  completion  \x1b[2J[red]漢字")
    assert lines[-1].endswith(r"\ud800\t")
    assert max(map(cell_len, lines)) <= width
    console.print_sample("sample at step 1:", "", "")
    assert capsys.readouterr().out == "sample at step 1:\n  prompt      \n  completion  \n"


def test_only_one_rank_prints_and_log_level_is_respected(tmp_path, capsys):
    config = load_config(DistillationConfig, write_recipe(tmp_path), ["--log_level", "error"])
    console = Console(config)
    _log(console, STEP | {"alarm": "First: one."})
    console.print_sample("title", "prompt", "completion")
    console.print_changes([("reverse KL", 1.0, 0.5)])
    assert capsys.readouterr().out == ""
    for level in ("warning", "info"):
        options = ["--log_level", level]
        _log(Console(load_config(DistillationConfig, tmp_path / "recipe.yaml", options)), STEP)
        assert "0.2500" in capsys.readouterr().out
    rank = SimpleNamespace(disable_tqdm=False, process_index=1)
    assert hides_bars(rank) is True
    assert hides_bars(SimpleNamespace(disable_tqdm=True, process_index=0)) is True
    assert hides_bars(SimpleNamespace(disable_tqdm=False, process_index=0)) is None  # in a terminal


def _print_on_a_rank(rank, folder):
    with open(f"{folder}/rank{rank}.txt", "w") as file:
        sys.stdout = file
        options = {"output_dir": f"{folder}/run{rank}", "max_steps": 1, "preflight": False}
        trainer = make_trainer(Path(folder, str(rank)), **options)
        trainer.train()
        sys.stdout = sys.__stdout__


def test_other_ranks_print_nothing(tmp_path):
    for rank in range(2):
        write_recipe(tmp_path / str(rank))
    run_ranks(_print_on_a_rank, tmp_path)
    assert "sample at step 0" in (tmp_path / "rank0.txt").read_text()
    assert _columns((tmp_path / "rank0.txt").read_text())
    assert (tmp_path / "rank1.txt").read_text() == ""


RLVR = NO_TEACHER | {"completions_per_prompt": 2, "eval_data": None}


@pytest.mark.parametrize(
    ("stage", "changes", "columns"),
    [
        (DistillationConfig, {}, "loss KL overlap mass length tokens/s"),
        (SFTConfig, NO_TEACHER | {"eval_data": None}, "loss length tokens/s"),
        (RLVRConfig, RLVR, "loss reward length tokens/s"),
        (RLVRConfig, RLVR | {"kl_coef": 0.1}, "loss KL reward length tokens/s"),
    ],
)
def test_a_stage_has_the_columns_of_what_it_measures(tmp_path, capsys, stage, changes, columns):
    rows = [{"prompt": f"say {i}", "completion": "ok"} for i in range(12)]
    write_recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_data": str(tmp_path / "rows.jsonl"), "max_steps": 2, "preflight": False}
    trainer = make_trainer(tmp_path, stage, **changes | options)
    trainer.train()
    output = capsys.readouterr().out
    headers = _columns(output)  # an alarm begins the table anew
    assert headers == [["step", *columns.split(), "left"]] * len(headers)
    assert headers
    steps, _ = read_metrics(tmp_path / "run")
    assert all(("reward" in line) == (stage is RLVRConfig) for line in steps)
    assert all(("informative" in line) == (stage is RLVRConfig) for line in steps)
    (row,) = (line.split() for line in output.splitlines() if line.startswith("  2/2"))
    assert float(row[1]) == pytest.approx(steps[1]["loss"], abs=1e-4)
    if "KL" in columns:
        kl = steps[1].get("reverse_kl", steps[1].get("kl_to_start"))
        assert float(row[2]) == pytest.approx(kl, abs=1e-4)
    # Before the first step: without held-out prompts, a sample of the first step.
    samples = [i for i, line in enumerate(output.splitlines()) if line == "sample at step 0:"]
    header = [i for i, line in enumerate(output.splitlines()) if line.split()[0] == "step"]
    assert len(samples) == 1
    assert samples < header
    if stage is SFTConfig:
        assert re.search(r"  prompt      u : s a y   \d+ / a :\n  completion  o k </s>\n", output)


def test_a_sample_is_shown_at_every_evaluation(tmp_path, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **options).train()
    titles = [x for x in capsys.readouterr().out.splitlines() if x.startswith("sample")]
    assert titles == [f"sample at step {step}:" for step in (0, 2, 4)]


def _command(recipe, *options):
    return [sys.executable, "-m", "opd_trainer", "distill", str(recipe), *options]


def _in_a_terminal(command, columns):
    """Return what a command writes to a terminal of its own."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        output = b""
        while select.select([main], [], [], 60)[0]:
            try:
                output += os.read(main, 1 << 16)
            except OSError:  # the end, on Linux
                break
        assert process.wait(60) == 0, output.decode()
    return output.decode()


def test_a_terminal_has_colours_and_a_bar_and_a_file_has_neither(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, disable_tqdm=None, max_steps=2, tail="drop")
    shown = _in_a_terminal(_command(recipe), 80)
    assert re.search("\x1b\\[1m +step", shown)
    assert re.search("\x1b\\[1;33malarm: The support", shown)
    assert re.search(r"steps: +0%\|.*\| 0/2", shown)
    # No bar is left on a line of the table.
    visible = re.sub("\x1b\\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    screen = [line.rpartition("\r")[2] for line in visible.splitlines()]
    rows = [line for line in screen if re.match(" +[12]/2 ", line)]
    assert len(rows) == 2
    assert all(re.fullmatch(r" +[12]/2( +[-\d.:]+){7}", row) for row in rows)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in many CI systems
    command = _command(recipe, "--output_dir", str(tmp_path / "other"))
    written = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in written.stdout + written.stderr
    assert "\r" not in written.stdout + written.stderr
    assert "%|" not in written.stderr
    (alarm,) = (x for x in written.stdout.splitlines() if x.startswith("alarm: "))
    assert "temperature." in alarm


def test_an_ascii_terminal_shows_what_it_can(tmp_path):
    write_recipe(tmp_path)
    rows = [{"prompt": f"é漢{i}"} for i in range(12)]
    path = tmp_path / "unicode.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path, max_steps=1, eval_data=str(path), train_data=str(path))
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(_command(recipe), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"sample at step 1:" in done.stdout
    assert done.stdout.isascii()

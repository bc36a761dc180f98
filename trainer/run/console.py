"""What a run prints: a table of its steps, samples, held-out metrics and alarms."""

import sys
import time
from collections.abc import Iterable
from typing import Any

import datasets
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from opd_trainer.config import StageConfig

# Columns by title: names of metrics, and a format. A stage logs at most one of the names. With the
# steps and the time left, a line of 10,000 steps of distillation has 74 characters.
_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "loss": (("loss",), ""),
    "KL": (("reverse_kl", "kl_to_start"), ""),
    "reward": (("reward",), ".3f"),
    "overlap": (("overlap",), ".3f"),
    "mass": (("student_mass",), ".3f"),
    "length": (("completion_length",), ".1f"),
    "tokens/s": (("tokens_per_second",), ".0f"),
}
_HELD_OUT = {
    "KL": ("eval_reverse_kl", "eval_reverse_kl_on_own_samples"),
    "overlap": ("eval_overlap", "eval_overlap_on_own_samples"),
    "score": ("eval_score",),
    "length": ("eval_completion_length",),
}
_ROWS = 20  # lines of the table under each header
_WIDEST = 120  # characters of a line of a sample


def hides_bars(config: StageConfig) -> bool | None:
    """Return tqdm's `disable`: one rank shows progress bars, and only in a terminal."""
    return True if config.disable_tqdm or config.process_index > 0 else None


def hide_bars_of_libraries(config: StageConfig) -> None:
    """Hide the bars of transformers and datasets where `hides_bars` hides ours."""
    if hides_bars(config) or not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


class Console(TrainerCallback):
    """Prints a run on one rank: with colours in a terminal, as plain lines elsewhere.

    A log_level above warning silences it. metrics.jsonl has everything that is logged.
    """

    def __init__(self, config: StageConfig) -> None:
        level = config.get_process_log_level()
        self.is_quiet = config.process_index > 0 or level > logging.WARNING
        # By itself, rich writes escape codes to a file if FORCE_COLOR is set.
        self.terminal = Terminal(force_terminal=sys.stdout.isatty(), highlight=False)
        self.bar = tqdm(disable=True)
        self.columns: list[str] = []
        self.rows = 0  # since the last header
        self.has_shown_sample = False
        self.start: tuple[int, float] | None = None  # step and time

    def on_train_begin(self, args: StageConfig, state: TrainerState, *_: Any, **__: Any) -> None:
        logging.disable_progress_bar()  # a bar of a saved checkpoint would stay in the table
        options = {"total": state.max_steps, "initial": state.global_step, "desc": "steps"}
        self.bar = tqdm(**options, disable=hides_bars(args), leave=False, dynamic_ncols=True)

    def on_step_begin(self, args: StageConfig, state: TrainerState, *_: Any, **__: Any) -> None:
        self.start = self.start or (state.global_step, time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()

    def on_log(
        self, args: StageConfig, state: TrainerState, *_: Any, logs: dict[str, Any], **__: Any
    ) -> None:
        """Print a line of the table and alarms, held-out metrics, or the duration of the run."""
        if "loss" in logs:
            self._print_row(logs, state)
            for alarm in logs.get("alarm", "").splitlines():
                self.print(f"alarm: {alarm}", "bold yellow")
        elif "train_runtime" in logs:
            self.print(f"{state.global_step} steps in {_duration(logs['train_runtime'])}")
        elif any(name.startswith("eval_") for name in logs):
            shown = {title: _first(logs, names) for title, names in _HELD_OUT.items()}
            texts = [f"{title} {x:.3g}" for title, x in shown.items() if x is not None]
            self.print(f"held-out at step {state.global_step}: {', '.join(texts)}", "cyan")

    def _print_row(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Print a line of the table, under a header if columns are new or the last one is far."""
        values = {title: _first(logs, names) for title, (names, _) in _COLUMNS.items()}
        columns = [t for t in _COLUMNS if values[t] is not None or t in self.columns]
        width = max(5, 2 * len(str(state.max_steps)) + 1)
        if columns != self.columns or self.rows in (0, _ROWS):
            self.columns, self.rows = columns, 0
            self._write("step".rjust(width) + _cells([*columns, "left"]), "bold")
        cells = [_number(values[title], _COLUMNS[title][1]) for title in columns]
        cells.append(_duration(self._seconds_left(state)))
        self._write(f"{state.global_step}/{state.max_steps}".rjust(width) + _cells(cells))
        self.rows += 1

    def _seconds_left(self, state: TrainerState) -> float | None:
        if self.start is None or state.global_step == self.start[0]:
            return None
        per_step = (time.monotonic() - self.start[1]) / (state.global_step - self.start[0])
        return per_step * (state.max_steps - state.global_step)

    def print_sample(self, title: str, prompt: str, completion: str) -> None:
        """Print a completion and the prompt as the student sees it, each cut to a few lines."""
        self.has_shown_sample = True
        self.print(title, "bold")
        for label, text in (("prompt", prompt), ("completion", completion)):
            width = max(20, min(self.terminal.width, _WIDEST) - 14)
            lines = _excerpt(self.terminal, text, width)
            for name, line in zip([label, *[""] * len(lines)], lines, strict=False):
                self.print(f"  {name:10}  {line}")

    def print_changes(self, rows: Iterable[tuple[str, float, float]]) -> None:
        """Print a table of the held-out metrics before and after training."""
        table = Table(box=None, pad_edge=False)
        for title in ("held-out", "before", "after"):
            table.add_column(title, justify="left" if title == "held-out" else "right")
        for name, before, after in rows:
            table.add_row(name, f"{before:.3f}", f"{after:.3f}")
        if not self.is_quiet:
            self.terminal.print("", table, "", sep="\n")

    def print(self, text: str, style: str = "") -> None:
        """Print a line; the table goes on under a new header."""
        self.rows = 0
        self._write(text, style)

    def _write(self, text: str, style: str = "") -> None:
        if self.is_quiet:
            return
        encoding, is_file = self.terminal.encoding, not self.terminal.is_terminal
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        # Printed over a progress bar, the text would be torn; so bars are cleared and drawn again.
        with tqdm.external_write_mode():
            self.terminal.print(text, style=style, markup=False, emoji=False, soft_wrap=is_file)


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:>9}" for text in texts)


def _first(logs: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((logs[name] for name in names if name in logs), None)


def _number(value: float | None, form: str = "") -> str:
    if value is None:
        return "-"
    is_fixed = value == 0 or 1e-3 <= abs(value) < 1e3
    return format(value, form or (".4f" if is_fixed else ".1e"))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _excerpt(terminal: Terminal, text: str, width: int) -> list[str]:
    """Return a text in at most four lines: of a longer one, the first two and the end.

    Line breaks and control characters are escaped: a template's line breaks count, and a model may
    write codes that would change the terminal.
    """
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def lines(part: str) -> list[str]:
        return [line.plain for line in Text(part).wrap(terminal, width)] or [""]

    if len(escaped) <= 4 * width and len(whole := lines(escaped)) <= 4:
        return whole
    return [*lines(escaped[: 3 * width])[:2], "...", lines(escaped[-width:])[-1]]

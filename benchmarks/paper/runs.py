"""Runs of recipes in one-thread worker processes; finished runs are kept and found by digest."""

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Line = dict[str, Any]
RECIPES = Path("recipes/paper")
METRICS, RESULT, LOG = "metrics.jsonl", "result.json", "log.txt"


@dataclass(frozen=True)
class Run:
    """A recipe of recipes/paper with changed keys, and the runs whose models it uses."""

    folder: Path  # the output_dir
    stage: str
    recipe: str
    changes: dict[str, Any]
    needs: tuple["Run", ...] = ()

    @property
    def model(self) -> str:
        """The path of the student after the run."""
        return str(self.folder / "model")

    @cached_property
    def digest(self) -> str:
        """A hash of everything that determines the result, except the code."""
        files = [self.changes.get(key) for key in ("train_data", "eval_data")]
        content = [hashlib.sha256(Path(x).read_bytes()).hexdigest() for x in files if x]
        text = (RECIPES / self.recipe).read_text(encoding="utf-8")
        parts = [self.stage, text, self.changes, content, [x.digest for x in self.needs]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def result(self) -> list[Line] | None:
        """Return the log lines of an earlier run with the same digest, if there is one."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return earlier["lines"] if earlier["digest"] == self.digest else None

    def config(self) -> Any:
        """Return the stage's config, read by the trainer's own loader."""
        from opd_trainer.command.keys import STAGES
        from opd_trainer.config import load_config, stages

        changes = self.changes | {"output_dir": str(self.folder)}
        texts = {k: x if isinstance(x, str) else json.dumps(x) for k, x in changes.items()}
        options = [f"--{key}={text}" for key, text in texts.items()]
        return load_config(getattr(stages, STAGES[self.stage]), RECIPES / self.recipe, options)

    def execute(self) -> list[Line]:
        """Run in this process and return the log lines; output is written to log.txt."""
        from opd_trainer.__main__ import evaluate
        from opd_trainer.build import prepare
        from opd_trainer.config import EvaluationConfig

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with open(self.folder / LOG, "w") as log, redirect_stdout(log), redirect_stderr(log):
            config = self.config()
            if isinstance(config, EvaluationConfig):
                evaluate(config)
            else:
                trainer, _ = prepare(config)
                trainer.train()
                if trainer.interruption.stopped:  # the trainer caught the signal and returned
                    raise KeyboardInterrupt
                trainer.save_student()
        text = (self.folder / METRICS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        result = json.dumps({"digest": self.digest, "lines": lines})
        (self.folder / RESULT).write_text(result, encoding="utf-8")
        return lines


@dataclass
class Laboratory:
    """A directory of runs, and the workers that execute them; with 0 workers this process does."""

    root: Path
    workers: int = 0
    pool: ProcessPoolExecutor | None = field(init=False, default=None)
    threads: int = field(init=False, default=1)  # of this process before it entered
    written: set[str] = field(init=False, default_factory=set)  # names of data files

    def __enter__(self) -> "Laboratory":
        if self.workers:
            # OpenMP reads its thread count when a process starts; a forked one would keep ours.
            os.environ["OMP_NUM_THREADS"] = "1"
            context = get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _start)
        else:
            self.threads = torch.get_num_threads()
            torch.set_num_threads(1)  # on models this small more threads only wait for each other
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        else:
            torch.set_num_threads(self.threads)

    def data(self, name: str, make: Callable[[], Iterable[Line]]) -> str:
        """Return the path of a data file; its rows are made once per laboratory."""
        path = self.root / "data" / f"{name}.jsonl"
        if name not in self.written:
            self.written.add(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in make()), encoding="utf-8")
        return str(path)

    def measure(self, runs: Sequence[Run], label: str) -> list[list[Line]]:
        """Return the log lines of each run; runs with a kept result are not executed again."""
        results = {run.folder: run.result() for run in runs}
        missing = {run.folder: run for run in runs if results[run.folder] is None}
        with tqdm(total=len(results), initial=len(results) - len(missing), desc=label) as bar:
            for folder, lines in self._execute(list(missing.values())):
                results[folder] = lines
                bar.set_postfix_str(folder.name, refresh=False)
                bar.update()
        return [results[run.folder] or [] for run in runs]

    def _execute(self, runs: list[Run]) -> Iterable[tuple[Path, list[Line]]]:
        if self.pool is None:
            yield from ((run.folder, _attempt(run)) for run in runs)
            return
        futures: dict[Future[list[Line]], Run] = {self.pool.submit(_attempt, x): x for x in runs}
        for future in as_completed(futures):
            yield futures[future].folder, future.result()


def _start() -> None:
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _attempt(run: Run) -> list[Line]:
    try:
        return run.execute()
    except (Exception, SystemExit) as error:
        with open(run.folder / LOG, "a") as log:
            log.write(traceback.format_exc())
        raise RuntimeError(f"{run.folder}: {error!r}; see its {LOG}") from None


def curve(lines: list[Line], metric: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric."""
    points = [(line["step"], float(line[metric])) for line in lines if metric in line]
    return [step for step, _ in points], [value for _, value in points]


def last(lines: list[Line], metric: str) -> float:
    """Return the last value of a metric in a run."""
    return curve(lines, metric)[1][-1]


def first(lines: list[Line], metric: str) -> float:
    """Return the first value of a metric in a run."""
    return curve(lines, metric)[1][0]


def by_seed(
    results: Sequence[list[Line]], value: Callable[[list[Line], str], float], metric: str
) -> list[float]:
    """Return the first or last value of a metric for each seed's run."""
    return [value(lines, metric) for lines in results]

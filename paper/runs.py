"""Runs of recipes in persistent worker processes of one thread each, kept by their digest."""

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
    """A recipe of recipes/paper with changes of its keys, and the runs whose models it takes."""

    folder: Path  # its output_dir
    stage: str
    recipe: str
    changes: dict[str, Any]
    needs: tuple["Run", ...] = ()

    @property
    def model(self) -> str:
        """Where the student is, once it ran."""
        return str(self.folder / "model")

    @cached_property
    def digest(self) -> str:
        """Of everything that the result depends on, but the code."""
        files = [self.changes.get(key) for key in ("train_data", "eval_data")]
        content = [hashlib.sha256(Path(x).read_bytes()).hexdigest() for x in files if x]
        text = (RECIPES / self.recipe).read_text(encoding="utf-8")
        parts = [self.stage, text, self.changes, content, [x.digest for x in self.needs]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def result(self) -> list[Line] | None:
        """The log lines that it left, if it has run like this."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["lines"] if kept["digest"] == self.digest else None

    def config(self) -> Any:
        """The stage's config, as the trainer reads it."""
        from trainer.__main__ import STAGES
        from trainer.config import load_config

        changes = self.changes | {"output_dir": str(self.folder)}
        pairs = [x for key, value in changes.items() for x in (f"--{key}", json.dumps(value))]
        return load_config(STAGES[self.stage][0], RECIPES / self.recipe, pairs)

    def execute(self) -> list[Line]:
        """Run it in this process; what it prints goes to log.txt beside its figures."""
        from trainer.__main__ import evaluate
        from trainer.build import prepare
        from trainer.config import EvaluationConfig

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with open(self.folder / LOG, "w") as log, redirect_stdout(log), redirect_stderr(log):
            config = self.config()
            if isinstance(config, EvaluationConfig):
                evaluate(config)
            else:
                trainer, _ = prepare(config)
                trainer.train()
                if trainer.interruption.stopped:  # the trainer has caught the signal
                    raise KeyboardInterrupt
                trainer.save_student()
        text = (self.folder / METRICS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        kept = json.dumps({"digest": self.digest, "lines": lines})
        (self.folder / RESULT).write_text(kept, encoding="utf-8")
        return lines


@dataclass
class Laboratory:
    """A directory of runs, and the workers that do them; without workers this process does."""

    root: Path
    workers: int = 0
    pool: ProcessPoolExecutor | None = field(init=False, default=None)
    threads: int = field(init=False, default=1)  # that this process had
    made: set[str] = field(init=False, default_factory=set)  # names of data

    def __enter__(self) -> "Laboratory":
        if self.workers:
            # What a worker starts with decides its threads, and a fork would share this one's.
            os.environ["OMP_NUM_THREADS"] = "1"
            context = get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _start)
        else:
            self.threads = torch.get_num_threads()
            torch.set_num_threads(1)  # more of them would wait for each other on models this small
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        else:
            torch.set_num_threads(self.threads)

    def data(self, name: str, make: Callable[[], Iterable[Line]]) -> str:
        """The path of a recipe's data, whose rows are made once by each process."""
        path = self.root / "data" / f"{name}.jsonl"
        if name not in self.made:
            self.made.add(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in make()), encoding="utf-8")
        return str(path)

    def measure(self, runs: Sequence[Run], label: str) -> list[list[Line]]:
        """The log lines of each run, in their order; those that ran before are read again."""
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
        raise RuntimeError(f"{run.folder}: {error!r}; its {LOG} says more") from None


def curve(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure."""
    kept = [(line["step"], float(line[name])) for line in lines if name in line]
    return [step for step, _ in kept], [value for _, value in kept]


def last(lines: list[Line], name: str) -> float:
    """A figure at the end of a run."""
    return curve(lines, name)[1][-1]


def first(lines: list[Line], name: str) -> float:
    """A figure at the start of a run."""
    return curve(lines, name)[1][0]


def by_seed(results: Sequence[list[Line]], figure: Callable[..., float], name: str) -> list[float]:
    """A figure of each seed's run."""
    return [figure(lines, name) for lines in results]

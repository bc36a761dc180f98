"""The directory of a run: one process's at a time, and written so that a kill at any moment leaves
whole files and whole checkpoints.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from trainer.config import StageConfig

METRICS, CONFIG, MANIFEST = "metrics.jsonl", "config.json", "manifest.json"
SAMPLES = "samples/step-{}.jsonl"
MODEL = "model"  # the student, when the run is over
SAVING = ".saving"  # where a checkpoint is made
_CHECKPOINT = "checkpoint-"
_locks: dict[Path, FileLock] = {}  # held until the process ends


def claim_output_directory(config: StageConfig) -> str | None:
    """Make the directory this process's own; its newest whole checkpoint, if it is to resume."""
    run, resumes = Path(config.output_dir), config.resume_from_checkpoint == "auto"
    writes = config.should_save  # one of the ranks
    if writes and run.exists():
        _lock(run)
        _restore(run)
    steps, is_over = _steps(run), (run / MODEL).exists()
    if resumes and is_over and not steps:
        raise ValueError(
            f"resume_from_checkpoint: {run} holds a run that is over and kept no checkpoint; "
            "choose another output_dir"
        )
    if not resumes and (steps or (run / METRICS).exists()):
        remedy = "" if is_over and not steps else ", or --resume_from_checkpoint auto"
        raise ValueError(f"output_dir: {run} holds another run; choose another one{remedy}")
    run.mkdir(parents=True, exist_ok=True)
    if writes:
        _lock(run)
    checkpoint = _newest_whole(run, sets_aside=writes) if resumes else None
    if writes:
        write_whole(run / CONFIG, json.dumps(recipe_of(config), indent=1))
    return checkpoint


def _steps(run: Path) -> list[int]:
    names = (path.name.removeprefix(_CHECKPOINT) for path in run.glob(f"{_CHECKPOINT}*"))
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _newest_whole(run: Path, sets_aside: bool) -> str | None:
    """What is newer is damaged: it gives up its name, or it would count as the newest still."""
    damaged: list[Path] = []
    for step in _steps(run):
        checkpoint = run / f"{_CHECKPOINT}{step}"
        if (reason := damage(checkpoint)) is None:
            break
        warnings.warn(f"{checkpoint} is passed over: {reason}", stacklevel=3)
        damaged.append(checkpoint)
    else:
        if damaged:
            raise ValueError(
                f"resume_from_checkpoint: {run} has no whole checkpoint, only damaged ones; choose "
                "another output_dir"
            )
        return None
    for path in damaged if sets_aside else []:
        aside = run / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    return str(checkpoint)


def _lock(run: Path) -> None:
    """Raise if another process works there; the system lets go of the lock of one that died."""
    lock = _locks.setdefault(run.resolve(), FileLock(run / ".lock", thread_local=False))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"output_dir: another process works in {run}; wait for its end, or choose another one"
        ) from None


def publish(staged: Path, final: Path) -> None:
    """Move a directory out of the one where it was made, with a manifest, once it is on the disk:
    it is seen whole or not at all.
    """
    manifest = {}
    for path in sorted(filter(Path.is_file, staged.rglob("*"))):
        with path.open("rb") as file:
            manifest[str(path.relative_to(staged))] = _digest(file)
            os.fsync(file.fileno())
    with (staged / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        os.replace(final, staged.with_suffix(".old"))
    os.replace(staged, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name too
    os.close(folder)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _restore(run: Path) -> None:
    """Put back what `publish` had moved out of the way when it was killed."""
    for old in (run / SAVING).glob("*.old"):
        if not (run / old.stem).exists():
            os.replace(old, run / old.stem)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is seen as it was before, or with all of the text."""
    staged = path.with_name(f".{path.name}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk has no name


def damage(checkpoint: Path) -> str | None:
    """What differs from the checkpoint's manifest, or None if it is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest.items():
            with (checkpoint / name).open("rb") as file:
                if _digest(file) != expected:
                    return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def recipe_of(config: StageConfig) -> dict[str, Any]:
    """The keys whose values are not the defaults."""
    values = config.to_dict()
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory()
               for f in fields(config)}  # fmt: skip
    return {name: values[name] for name in default if values.get(name) != default[name]}

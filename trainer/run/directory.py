"""The directory of a run: one process at a time uses it, and it stays intact if that is killed."""

import json
import os
import shutil
import warnings
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from transformers.trainer_utils import sort_checkpoints

from opd_trainer.config import StageConfig, changed_keys
from opd_trainer.run import METRICS
from opd_trainer.run.starts import changes, describe_start

CONFIG, MANIFEST = "config.json", "manifest.json"
STARTS = "starts.jsonl"  # the recipe of each start; config.json is that of the last
COMPLETIONS = "completions.jsonl"  # that a teacher wrote for sft
SAMPLES = "samples/step-{}.jsonl"
REPORT = "report.md"  # held-out metrics and samples, before and after
MODEL = "model"  # the student at the end of the run
SAVING = ".saving"  # where a checkpoint is written before it is published
_locks: dict[Path, FileLock] = {}  # held until the process ends


def claim_output_directory(config: StageConfig) -> str | None:
    """Lock the directory for this process; return the newest whole checkpoint if it resumes."""
    run, resumes = Path(config.output_dir), config.resume_from_checkpoint == "auto"
    writes = config.should_save  # true on one rank
    if writes and run.exists():
        _lock(run)
        for old in (run / SAVING).glob("*.old"):  # `publish` was killed between two renames
            if not (run / old.stem).exists():
                os.replace(old, run / old.stem)
    checkpoints, has_ended = sort_checkpoints(str(run)), (run / MODEL).exists()
    if resumes and has_ended and not checkpoints:
        problem = f"{run} holds a run that is over and kept no checkpoint"
        raise ValueError(f"resume_from_checkpoint: {problem}; choose another output_dir")
    if not resumes and (checkpoints or (run / METRICS).exists()):
        remedy = "" if has_ended and not checkpoints else ", or --resume_from_checkpoint auto"
        raise ValueError(f"output_dir: {run} holds another run; choose another one{remedy}")
    run.mkdir(parents=True, exist_ok=True)
    if writes:
        _lock(run)
    checkpoint = _newest_whole(run, rename=writes) if resumes else None
    _record_start(run, config, checkpoint, resumes, writes)
    return checkpoint


def _record_start(
    run: Path, config: StageConfig, checkpoint: str | None, resumes: bool, writes: bool
) -> None:
    """Record the recipe; raise ValueError if it is another than that of the checkpoint."""
    path, start = run / STARTS, describe_start(config, checkpoint)
    lines = path.read_text().splitlines() if resumes and path.exists() else []
    try:
        taken = changes(json.loads(lines[-1]), start) if lines else []
    except ValueError:
        if checkpoint is not None:
            raise
        taken = []  # it starts from the beginning, without anything of the other recipe
        if writes:
            (run / COMPLETIONS).unlink(missing_ok=True)
    if writes:
        if checkpoint is not None:
            print(f"resume: from {checkpoint}")
            print("".join(f"resume: {change}\n" for change in taken), end="")
        write_whole(run / CONFIG, json.dumps(changed_keys(config), indent=1))
        write_whole(path, "".join(f"{line}\n" for line in [*lines, json.dumps(start)]))


def _newest_whole(run: Path, rename: bool) -> str | None:
    """Return the newest whole checkpoint.

    Newer ones are damaged. They are renamed, since transformers would take one as the newest.
    """
    damaged: list[Path] = []
    for checkpoint in map(Path, reversed(sort_checkpoints(str(run)))):
        if (reason := damage(checkpoint)) is None:
            for path in damaged if rename else []:
                aside = run / f"damaged-{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            return str(checkpoint)
        warnings.warn(f"{checkpoint} is passed over: {reason}", stacklevel=3)
        damaged.append(checkpoint)
    if damaged:
        problem = f"{run} has no whole checkpoint, only damaged ones"
        raise ValueError(f"resume_from_checkpoint: {problem}; choose another output_dir")
    return None


def _lock(run: Path) -> None:
    """Raise ValueError if another process holds the lock, which the system frees when it dies."""
    lock = _locks.setdefault(run.resolve(), FileLock(run / ".lock", thread_local=False))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        problem = f"another process works in {run}; wait for its end, or choose another one"
        raise ValueError(f"output_dir: {problem}") from None


def publish(staged: Path, final: Path) -> None:
    """Write a manifest, flush to disk and rename, so that `final` is whole whenever it exists."""
    manifest = {}
    for path in sorted(filter(Path.is_file, staged.rglob("*"))):
        with path.open("rb") as file:
            manifest[str(path.relative_to(staged))] = sha_fileobj(file).hex()
            os.fsync(file.fileno())
    with (staged / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        os.replace(final, staged.with_suffix(".old"))
    os.replace(staged, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)  # makes the rename durable
    os.close(folder)
    shutil.rmtree(staged.parent, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that readers see either the old content or all of the text."""
    staged = path.with_name(f".{path.name}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        # The error of a full disk does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from None


def damage(checkpoint: Path) -> str | None:
    """Return the first difference from the checkpoint's manifest, or None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest.items():
            with (checkpoint / name).open("rb") as file:
                if sha_fileobj(file).hex() != expected:
                    return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None

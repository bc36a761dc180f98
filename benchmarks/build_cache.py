"""Results of compilers and disassemblers, kept in build/cache by a hash of their inputs."""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build" / "cache"


def cached(inputs: Iterable[str | Path], compute: Callable[[], Any]) -> Any:
    """Return what `compute` returned for the same inputs before, or call it and keep its result.

    Processes may call it at the same time; at worst two of them compute the same result.

    Args:
        inputs: All that the result depends on: a path stands for the contents of the file.
        compute: Returns a result that JSON can hold. An exception is passed on and not kept.
    """
    digest = hashlib.sha256()
    for part in inputs:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{len(data)} ".encode() + data)
    path = FOLDER / f"{digest.hexdigest()[:32]}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = compute()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=FOLDER, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, path)  # a reader sees the whole file or none
    return result


def version(tool: str) -> str:
    """Return what `tool --version` prints."""
    command = [tool, "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

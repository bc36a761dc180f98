"""Sources of rows: files, datasets of the hub and generated tasks."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import yaml

from opd_trainer.errors import convert_errors

_EXPECTED = (
    "expected a .jsonl or .parquet file, a .json or .csv file, one of these texts as .gz, a "
    "dataset of the hub or reasoning_gym:TASK"
)


def load_rows(source: str, keep_errors: bool = False) -> Sequence[Any]:
    """Return the rows of a file or of a dataset.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, also .jsonl.gz, .json.gz or .csv.gz; a
            dataset on the hub, NAME?split=test&name=main; or reasoning_gym:TASK?OPTION=VALUE&...
            with the task's options.
        keep_errors: return a ValueError in the place of a line that is not JSON, instead of
            raising it.
    """
    name, _, query = source.partition("?")
    kind = Path(source.removesuffix(".gz")).suffix
    if kind == ".jsonl":
        return read_json_lines(Path(source), keep_errors=keep_errors)
    if kind == ".json":
        return _read_json(Path(source), keep_errors)
    if name.startswith("reasoning_gym:"):
        import reasoning_gym
    with convert_errors(f"{source}: {_EXPECTED}"):
        if kind == ".csv":
            return _read_csv(source)
        pairs = [option.partition("=")[::2] for option in query.split("&") if option]
        options = {key: yaml.safe_load(value) for key, value in pairs}
        if name.startswith("reasoning_gym:"):
            task = reasoning_gym.create_dataset(name.removeprefix("reasoning_gym:"), **options)
            return [{"prompt": entry["question"], **entry} for entry in task]
        from datasets import load_dataset

        if kind == ".parquet":
            return load_dataset("parquet", data_files=source, split="train")
        return load_dataset(name, **{"split": "train"} | options)


def read_json_lines(path: Path, may_be_cut: bool = False, keep_errors: bool = False) -> list[Any]:
    """Return the rows of a .jsonl file.

    Args:
        path: the file; .gz is unpacked.
        may_be_cut: leave out a last line that has no end.
        keep_errors: see `load_rows`.
    """
    rows: list[Any] = []
    content = _read(path)
    if may_be_cut:
        content = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(content.rstrip().splitlines(), start=1):
        try:
            rows.append(json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            wrong = ValueError(f"{path}, line {number}: malformed JSON: {reason}")
            if not keep_errors:
                raise wrong from None
            rows.append(wrong)
    return rows


def _read_json(path: Path, keep_errors: bool) -> list[Any]:
    """Return a list of rows, alone or as the only list of an object; or JSON lines."""
    try:
        content = json.loads(_read(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return read_json_lines(path, keep_errors=keep_errors)
        raise ValueError(f"{path}: malformed JSON: {error}") from None
    lists = [content]
    if isinstance(content, dict):
        lists = [x for x in content.values() if isinstance(x, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(f"{path}: expected a list of rows, or an object with one list of rows")
    return lists[0]


def _read_csv(source: str) -> list[dict[str, str | None]]:
    """Return the rows of a table of texts; an empty cell is None."""
    # pandas would read the text NA as a missing value and 007 as the number 7.
    table = pandas.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return [{k: x or None for k, x in row.items()} for row in table.to_dict("records")]


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    with convert_errors(f"{path}: expected a gzip file"):
        return gzip.decompress(content)

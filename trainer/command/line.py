"""The words of the command line, and its help. It imports neither PyTorch nor transformers."""

import argparse
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from opd_trainer.command.keys import STAGES, TRANSFORMERS, Key, groups_of, keys_of, refuse_unknown

_ON_OFF = ("true", "false", "yes", "no", "on", "off", "1", "0")
_REST = """Every key of transformers.TrainingArguments (precision, schedule, checkpoints, report_to)
is a key of a recipe too: https://huggingface.co/docs/transformers/main_classes/trainer. Paths in a
recipe are relative to its folder if they exist there, otherwise to the working directory; paths on
the command line and output_dir are relative to the working directory."""


def parse(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the command with its arguments, and the texts of a recipe's keys."""
    stage = words[0] if words and words[0] in STAGES else None
    if stage and not {"-h", "--help"} & set(words) and find_spec("transformers") is None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    others, texts = split(stage, words[1:]) if stage else (words[1:], {})
    parser = argparse.ArgumentParser("opd-train", description="Run a recipe.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"opd-train {_version()}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, config in STAGES.items():
        description = groups_of(config)[0].docstring
        command = commands.add_parser(
            name, help=description.partition("\n")[0], description=description, epilog=_REST,
            usage=f"opd-train {name} [--key value ...] RECIPE [--key value ...]",
        )  # fmt: skip
        command.add_argument("recipe", metavar="RECIPE", type=Path,
                             help="a YAML file, or the config.json of a run")  # fmt: skip
        if name == stage:
            _add_keys(command, config)
    command = commands.add_parser("report", help="Write one HTML page that compares runs.")
    command.add_argument("runs", type=Path, nargs="+", help="a recipe's output_dir")
    command.add_argument("--output", type=Path, default=Path("report.html"),
                         help="the page; default report.html")  # fmt: skip
    command = commands.add_parser("init", help="Write example recipes and their data.")
    command.add_argument("directory", type=Path, nargs="?", default=Path("recipes"),
                         help="where to write them; default recipes/")  # fmt: skip
    return parser.parse_args([*words[:1], *others]), texts


def _version() -> str:
    try:
        return version("opd-kernels")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def _add_keys(command: argparse.ArgumentParser, config: str) -> None:
    """Add the keys of a stage to its help."""
    keys = keys_of(config)
    for group in groups_of(config):
        if group.name == TRANSFORMERS or not group.keys:
            continue
        title, _, text = group.docstring.partition(".")
        if group.name == config:  # the docstring stands above already
            title, text = "The keys of this stage", ""
        shown = command.add_argument_group(title, text.strip() or None)
        for key in group.keys:
            names = [f"--{key.name}", *([f"--no-{key.name}"] if key.is_flag else [])]
            if key.name in keys:  # a base class may have it too
                shown.add_argument(*names, action="store_true", help=_help(keys.pop(key.name)))


def _help(key: Key) -> str:
    kind = key.values.replace("≥", ">=").replace("≤", "<=")
    default = f"; default {key.default}" if key.default else ""
    return f"{key.comment} [{kind}{default}]".strip().replace("%", "%%")


def split(stage: str, words: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words that belong to no key of a stage, and the texts of its keys.

    `--key value`, `--key=value` and, for keys that are true or false, `--key` and `--no-key` may
    stand anywhere.
    """
    keys, waiting = keys_of(STAGES[stage]), list(words)
    others: list[str] = []
    texts: dict[str, str] = {}
    while waiting:
        word = waiting.pop(0)
        name, has_text, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if not word.startswith("--") or name == "help":
            others.append(word)
        elif name not in keys and positive in keys and keys[positive].is_flag and not has_text:
            texts[positive] = "false"
        else:
            refuse_unknown([name], keys)
            has_next = bool(waiting) and not waiting[0].startswith("--")
            if has_text:
                texts[name] = text
            elif keys[name].is_flag and not (has_next and (others or waiting[0] in _ON_OFF)):
                texts[name] = "true"
            elif has_next:
                texts[name] = waiting.pop(0)
            else:
                raise ValueError(f"{name}: expected `--key value` pairs, got --{name} alone")
    return others, texts

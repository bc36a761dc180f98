"""Configs from recipes, and the functions that they name."""

import os
import runpy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from opd_trainer.command.keys import STAGES
from opd_trainer.command.line import split
from opd_trainer.command.recipe import read_recipe
from opd_trainer.config.base import StageConfig
from opd_trainer.errors import convert_errors

Stage = TypeVar("Stage", bound=StageConfig)
Function = Callable[..., Any]


def load_config(stage: type[Stage], recipe: Path, overrides: list[str]) -> Stage:
    """Return the config of a recipe with `--key value` overrides; raise ValueError for bad keys."""
    name = next(name for name, config in STAGES.items() if config == stage.__name__)
    others, texts = split(name, overrides)
    if others:
        raise ValueError(f"expected `--key value` pairs after the recipe, got {' '.join(others)}")
    return stage(**read_recipe(name, recipe, texts))


def changed_keys(config: StageConfig) -> dict[str, Any]:
    """Return the keys that differ from the defaults, as a recipe for any working directory."""
    values = config.to_dict() | {"output_dir": os.path.abspath(config.output_dir)}
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(config)
    }
    del defaults["hub_token"]  # never set, but a placeholder in `values`
    return {key: values[key] for key in defaults if values.get(key) != defaults[key]}


def _run_file(path: str) -> dict[str, Any]:
    """Run a file once until it changes, although its functions are looked up several times."""
    return _run_version(path, Path(path).stat().st_mtime_ns)


@cache
def _run_version(path: str, changed: int) -> dict[str, Any]:
    return runpy.run_path(path)


def load_function(key: str, reference: str, named: Mapping[str, Function]) -> Function:
    """Return the function that a key refers to; raise ValueError if there is none.

    Args:
        key: for the error message.
        reference: a name of `named`, file.py:function or module:function.
        named: functions by name.
    """
    if reference in named:
        return named[reference]
    source, _, name = reference.partition(":")
    expected = f"{key}: expected {', '.join(named)}, file.py:function or module:function"
    problem, is_file = f"{expected}, got {reference!r}", source.endswith(".py")
    try:
        with convert_errors(problem):
            functions = _run_file(source) if is_file else vars(import_module(source))
    except ModuleNotFoundError as error:
        raise ValueError(f"{problem}; {error}") from None
    if not callable(functions.get(name)):
        raise ValueError(f"{problem}, which has no such function")
    return functions[name]

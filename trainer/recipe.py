"""Recipes: from a YAML file and the command line to the config of a stage."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import yaml

from trainer.config import StageConfig

Stage = TypeVar("Stage", bound=StageConfig)


def load_config(stage: type[Stage], recipe: Path, overrides: list[str]) -> Stage:
    """The config of a recipe file with `--key value` pairs on top; a bad key raises ValueError."""
    values = yaml.safe_load(recipe.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    if len(overrides) % 2 or not all(key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"expected `--key value` pairs after the recipe, got {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        values[key.removeprefix("--").replace("-", "_")] = yaml.safe_load(value)
    known = {f.name for f in fields(stage) if f.init}
    for key in sorted(values.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{key}: unknown key; did you mean {close[0] if close else 'another'!r}?")
    for key in stage.REQUIRED:
        if key not in values:
            raise ValueError(f"{key}: missing; set it in {recipe} or pass --{key}")
    return stage(**values)

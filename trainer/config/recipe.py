"""Recipes: from a YAML file and the command line to the config of a stage."""

import difflib
import importlib
import runpy
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.config.base import StageConfig
from trainer.errors import explained

Stage = TypeVar("Stage", bound=StageConfig)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, whose last YAML would take, and what contains itself."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias of what has not ended yet
            raise ValueError(f"it contains itself{node.start_mark}")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is there twice, last{node.end_mark}")
        return super().construct_mapping(node, deep)


def load_config(stage: type[Stage], recipe: Path, overrides: list[str]) -> Stage:
    """The config of a recipe file with `--key value` pairs on top; a bad key raises ValueError."""
    with explained(f"recipe: expected `key: value` lines in {recipe}"):
        values = _Loader(recipe.read_text(encoding="utf-8")).get_single_data()
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    if len(overrides) % 2 or not all(key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"expected `--key value` pairs after the recipe, got {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        key = key.removeprefix("--").replace("-", "_")
        with explained(f"{key}: expected a value as in YAML, got {value!r}"):
            values[key] = _Loader(value).get_single_data()
    known = {f.name for f in fields(stage) if f.init}
    for key in sorted(str(key) for key in values.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{key}: unknown key; did you mean {close[0] if close else 'another'!r}?")
    for key in stage.REQUIRED:
        if key not in values:
            raise ValueError(f"{key}: missing; set it in {recipe} or pass --{key}")
    return stage(**values)


def load_function(key: str, reference: str, named: Iterable[str]) -> Callable[..., Any]:
    """The function that a recipe's key refers to.

    Args:
        key: the recipe's, for the message.
        reference: file.py:function or module:function.
        named: what the key could be instead.

    Raises:
        ValueError: there is no such function.
    """
    source, _, name = reference.partition(":")
    expected = f"{key}: expected {', '.join(named)}, file.py:function or module:function"
    try:
        with explained(f"{expected}, got {reference!r}"):
            if source.endswith(".py"):
                functions = runpy.run_path(source)
            else:
                functions = vars(importlib.import_module(source))
    except ModuleNotFoundError as error:
        raise ValueError(f"{expected}, got {reference!r}; {error}") from None
    if not callable(functions.get(name)):
        raise ValueError(f"{expected}, got {reference!r}, which has no such function")
    return functions[name]

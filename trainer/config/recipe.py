"""Recipes: YAML files with the keys of a stage's config, and the functions that they name."""

import difflib
import runpy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml

from opd_trainer.config.base import StageConfig
from opd_trainer.errors import convert_errors

Stage = TypeVar("Stage", bound=StageConfig)
Function = Callable[..., Any]


class _Loader(yaml.SafeLoader):
    """Refuses nodes that contain themselves and duplicate keys; YAML would take the last one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias of a node that is still open
            raise ValueError(f"it contains itself{node.start_mark}")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise ValueError(f"{duplicates[0]} is given twice, last{node.end_mark}")
        return super().construct_mapping(node, deep)


def load_config(stage: type[Stage], recipe: Path, overrides: list[str]) -> Stage:
    """Return the config of a recipe with `--key value` overrides; raise ValueError for bad keys."""
    with convert_errors(f"recipe: expected `key: value` lines in {recipe}"):
        values = _Loader(recipe.read_text(encoding="utf-8")).get_single_data()
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    if len(overrides) % 2 or not all(key.startswith("--") for key in overrides[::2]):
        raise ValueError(f"expected `--key value` pairs after the recipe, got {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        key = key.removeprefix("--").replace("-", "_")
        with convert_errors(f"{key}: expected a value as in YAML, got {value!r}"):
            values[key] = _Loader(value).get_single_data()
    known = {f.name for f in fields(stage) if f.init}
    for key in sorted(str(key) for key in values.keys() - known):
        close = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{key}: unknown key; did you mean {close[0] if close else 'another'!r}?")
    for key in stage.REQUIRED:
        if key not in values:
            raise ValueError(f"{key}: missing; set it in {recipe} or pass --{key}")
    return stage(**values)


def changed_keys(config: StageConfig) -> dict[str, Any]:
    """Return the keys whose values differ from the defaults, as JSON can hold them."""
    values = config.to_dict()
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(config)
    }
    return {key: values[key] for key in defaults if values.get(key) != defaults[key]}


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
            functions = runpy.run_path(source) if is_file else vars(import_module(source))
    except ModuleNotFoundError as error:
        raise ValueError(f"{problem}; {error}") from None
    if not callable(functions.get(name)):
        raise ValueError(f"{problem}, which has no such function")
    return functions[name]

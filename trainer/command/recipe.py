"""Recipes: the values of keys from a YAML file and from the command line."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal  # noqa: F401, for the annotations of keys

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError  # noqa: F401

from opd_trainer.command.keys import STAGES, Key, keys_of, refuse_unknown, required_by
from opd_trainer.errors import convert_errors

_FUNCTIONS = {"scorer", "objective"}
_TEMPLATES = {"chat_template", "teacher_chat_template"}
_PATHS = {"model", "teacher", "train_data", "eval_data"} | _FUNCTIONS | _TEMPLATES
# evaluate measures a model as it is, and trains nothing.
_OF_TRAINING = {
    "lora_r", "lora_alpha", "lora_target_modules", "push_to_hub", "resume_from_checkpoint"
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 does. Refuses nodes that contain themselves. Refuses
    duplicate keys too, where PyYAML would keep the last value without an error.
    """

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_recipe(stage: str, recipe: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a recipe's keys with those of the command line.

    Paths are relative to the recipe's folder if they exist there, otherwise to the working
    directory; paths of the command line and `output_dir` are relative to the working directory.

    Raises:
        ValueError: the file is not a recipe, or a key is unknown or missing.
    """
    keys = keys_of(STAGES[stage])
    with convert_errors(f"recipe: expected `key: value` lines in {recipe}"):
        loader = _Loader(recipe.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ValueError(f"recipe: expected `key: value` lines in {recipe}, got {values!r:.80}")
    for name, value in node.value:
        key = keys.get(name.value)
        if key and isinstance(value, yaml.ScalarNode):
            values[key.name] = _fitting(key, values[key.name], value.value)
    if stage == "evaluate":
        _adapt_to_evaluation(values, keys, texts)
    refuse_unknown(values, keys)
    for name in values.keys() & _PATHS:
        values[name] = _absolute(name, values[name], recipe.parent, Path())
    for name, text in texts.items():
        values[name] = _parsed(keys[name], text)
        if name in _PATHS:
            values[name] = _absolute(name, values[name], Path())
    for name in required_by(STAGES[stage]):
        if name not in values:
            raise ValueError(f"{name}: missing; set it in {recipe} or pass --{name}")
    for name, value in values.items():
        _check_early(keys[name], value)
    return values


def check_value(key: str, kind: TypeAdapter[Any], value: Any) -> Any:
    """Return a key's value, converted to its type; raise ValueError with what was expected."""
    try:
        checked = kind.validate_python(value)  # also converts numbers that YAML reads as strings
    except ValidationError as error:
        raise ValueError(f"{key}: {describe(error)}, got {value!r:.80}") from None
    if isinstance(value, bool) > isinstance(checked, bool):  # pydantic takes true for 1
        raise ValueError(f"{key}: input should be a number, got {value}")
    return checked


def describe(error: ValidationError) -> str:
    """Return what was expected; for a union, what each of its types expects."""
    reasons = (e["msg"].removeprefix("Value error, ") for e in error.errors())
    joined = " or ".join(dict.fromkeys(x[0].lower() + x[1:] for x in reasons))
    return joined.replace(" or input should be ", " or ")


def _check_early(key: Key, value: Any) -> None:
    """Check a value before the import of its config class, which takes seconds, if the key's type
    needs none of the names of other modules. The class checks all values again, and keys of
    transformers more strictly: here their numbers pass.
    """
    written: Any = ForwardRef(key.annotation)  # evaluated with the names of this module
    kind: TypeAdapter[Any] = TypeAdapter(written, config=ConfigDict(allow_inf_nan=False))
    if kind.pydantic_complete and (key.is_local or isinstance(value, str)):
        check_value(key.name, kind, value)


def _parsed(key: Key, text: str) -> Any:
    """Return the value of a text on the command line: what YAML makes of it, if it fits the key."""
    try:
        with convert_errors(f"{key.name}: expected a value as in YAML, got {text!r}"):
            value = _Loader(text).get_single_data()
    except ValueError:
        if "str" in key.types:
            return text
        raise
    return text if value is None and text != "null" else _fitting(key, value, text)


def _fitting(key: Key, value: Any, text: str) -> Any:
    """Return the value, or the text that it was read from if the key takes texts and no such value:
    the name 2024-01-01 is no date.
    """
    fits = {
        dict: "dict" in key.types,
        list: bool(key.types & {"list", "Messages"}),
        bool: "bool" in key.types or "Literal[False]" in key.annotation,
        type(None): "None" in key.types,
    }
    return value if "str" not in key.types or fits.get(type(value)) else text


def _absolute(key: str, value: Any, *folders: Path) -> Any:
    """Return a path in the first folder that has it, made absolute; other values unchanged."""
    if isinstance(value, dict):
        return {name: _absolute(key, x, *folders) for name, x in value.items()}
    if not isinstance(value, str) or value in ("", "self"):
        return value
    # file.py:function, or data?option=value
    path, mark, rest = value.partition(":" if key in _FUNCTIONS else "?")
    if key in _FUNCTIONS and not path.endswith(".py"):
        return value
    found = next((folder / path for folder in folders if (folder / path).exists()), None)
    return value if found is None else f"{os.path.abspath(found)}{mark}{rest}"


def _adapt_to_evaluation(
    values: dict[str, Any], keys: Mapping[str, Key], texts: Mapping[str, str]
) -> None:
    """Turn the recipe of a training stage into one of evaluate; name the keys that are left out."""
    of_stages = set().union(*(keys_of(config) for config in STAGES.values()))
    unused = {name for name in values if name in (of_stages - keys.keys()) | _OF_TRAINING}
    is_distilled = unused & (keys_of(STAGES["distill"]).keys() - keys_of(STAGES["sft"]).keys())
    if "teacher" not in values and (is_distilled or values.get("privileged_context")):
        values["teacher"] = "self"  # the default of distill
    if values.get("teacher") == "self" and "model" in texts and "model" in values:
        values["teacher"] = values["model"]  # self is the student before training
    run = values.get("output_dir")
    if run and (unused or (Path(run) / "model").exists()):  # it is for the run that trains
        values["output_dir"] = f"{values['output_dir']}/evaluation"
    for name in unused:
        del values[name]
    if unused and os.environ.get("RANK", "0") == "0":
        print(f"evaluate leaves out {', '.join(sorted(unused))}", file=sys.stderr)

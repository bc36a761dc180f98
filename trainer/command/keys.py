"""The keys of recipes, read from the source of the config classes.

Importing those classes takes seconds, because they import PyTorch and transformers. The command
line needs names, types and comments of the keys before: for its help, and to refuse a wrong key at
once. docs/hooks.py makes the tables of the documentation from the same comments.
"""

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STAGES = {
    "sft": "SFTConfig",
    "rlvr": "RLVRConfig",
    "distill": "DistillationConfig",
    "evaluate": "EvaluationConfig",
}
TRANSFORMERS = "TrainingArguments"
_PACKAGE = Path(__file__).parents[1]
_SOURCES = [_PACKAGE / f"config/{name}.py" for name in ("stages", "base", "values")]
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """A field of a config class."""

    name: str
    annotation: str  # as in the source, with the aliases of numbers and choices replaced
    default: str  # as in YAML; "" for none
    comment: str
    is_local: bool = True  # of the trainer, not of transformers

    @property
    def types(self) -> set[str]:
        """The names of the types of its values, without parameters: str, dict, None, ..."""
        plain, parameters = self.annotation, re.compile(r"\[[^\[\]]*\]")
        while parameters.search(plain):
            plain = parameters.sub("", plain)
        return set(plain.split(" | "))

    @property
    def is_flag(self) -> bool:
        """Whether `--key` without a value means true."""
        return "bool" in self.types and "str" not in self.types

    @property
    def values(self) -> str:
        """Describe the allowed values: `Annotated[int, Field(ge=1)]` as int ≥ 1."""
        kind = re.sub(r" \| None", "", self.annotation)
        kind = re.sub(r"Annotated\[(\w+), Field\(min_length=1\)\]", r"\1", kind)
        kind = re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", r"\1 \2", kind)
        kind = re.sub(r"(\w\w)=(\d)", lambda bound: f"{_BOUNDS[bound[1]]} {bound[2]}", kind)
        return re.sub(r"Literal\[(.*?)\]", r"\1", kind).replace("'", "").replace(" | ", " or ")


@dataclass(frozen=True)
class KeyGroup:
    """The fields that a config class adds to its base class."""

    name: str
    base: str | None
    docstring: str
    keys: list[Key]
    required: tuple[str, ...]  # keys that a recipe must have; () if they are the base's


@cache
def groups_of(stage: str) -> list[KeyGroup]:
    """Return the keys of a stage by class, those of TrainingArguments last if transformers is here.

    Args:
        stage: the name of the stage's config class.
    """
    sources = list(_SOURCES)
    if spec := find_spec("transformers"):  # finds a package without importing it
        sources += [Path(x) / "training_args.py" for x in spec.submodule_search_locations or ()]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    groups: list[KeyGroup] = []
    name: str | None = stage
    while source := next((x for x in texts if name and f"\nclass {name}" in x), None):
        groups.append(read_group(source, name or ""))
        name = groups[-1].base
    return groups


def keys_of(stage: str) -> dict[str, Key]:
    """Return the keys of a stage by name; a class overrides the keys of its base class."""
    keys: dict[str, Key] = {}
    for group in reversed(groups_of(stage)):
        for key in group.keys:
            base = keys.get(key.name, key)
            is_local = group.name != TRANSFORMERS
            # In the source of TrainingArguments, comments are headings.
            comment = key.comment or base.comment if is_local else ""
            keys[key.name] = replace(key, comment=comment, is_local=is_local)
    return keys


def required_by(stage: str) -> tuple[str, ...]:
    """Return the keys that a recipe of a stage must have."""
    return next(group.required for group in groups_of(stage) if group.required)


def refuse_unknown(names: Iterable[Any], keys: Mapping[str, Key]) -> None:
    """Raise ValueError for a name that is no key, with the nearest key."""
    for name in sorted(str(name) for name in names if name not in keys):
        close = difflib.get_close_matches(name, keys, n=1)
        raise ValueError(f"{name}: unknown key; did you mean {close[0] if close else 'another'!r}?")


def read_group(source: str, name: str) -> KeyGroup:
    """Return the fields of a class in a module's source."""
    lines, module = source.splitlines(), ast.parse(source)
    config = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    aliases, keys, required = _aliases(module), [], ()
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id == "REQUIRED" and node.value:
                required = ast.literal_eval(node.value)
            written = ast.unparse(node.annotation)
            kind = re.sub(r"\w+", lambda word: aliases.get(word[0], word[0]), written)
            if not kind.startswith("ClassVar") and not node.target.id.startswith("_"):
                keys.append(Key(node.target.id, kind, _default(node.value), _comment(lines, node)))
    base = config.bases[0].id if config.bases and isinstance(config.bases[0], ast.Name) else None
    return KeyGroup(name, base, ast.get_docstring(config) or "", keys, required)


def _aliases(module: ast.Module) -> dict[str, str]:
    """Return the type aliases of a module and of the trainer's modules that it imports from."""
    names = [n.module or "" for n in module.body if isinstance(n, ast.ImportFrom)]
    names = [name.removeprefix("opd_trainer.") for name in names if name.startswith("opd_trainer.")]
    paths = [_PACKAGE / f"{name.replace('.', '/')}.py" for name in names]
    modules = [module, *(ast.parse(path.read_text("utf-8")) for path in paths if path.exists())]
    assignments = [n for m in modules for n in m.body if isinstance(n, ast.Assign)]
    known = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in assignments}
    return {
        name: kind for name, kind in known.items() if re.match(r"Annotated\[(int|float)|Lit", kind)
    }


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):  # field(...)
        defaults = [k.value for k in value.keywords if k.arg in ("default", "default_factory")]
        value = defaults[0] if defaults else None
    written = "" if value is None else ast.unparse(value)
    known = {"True": "true", "False": "false", "None": "", "dict": "{}", "''": ""}
    return known.get(written, written.strip("'"))


def _comment(lines: list[str], statement: ast.AnnAssign) -> str:
    """Return the comments above a field and behind it."""
    above, number = "", statement.lineno - 2
    while lines[number].lstrip().startswith("#"):
        above, number = f"{lines[number].strip(' #')} {above}", number - 1
    assert statement.end_lineno is not None
    behind = lines[statement.end_lineno - 1][statement.end_col_offset :].strip(" #")
    return (above + behind).strip()

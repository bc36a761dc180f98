"""What the site is made of beside Markdown and docstrings: MathML, and tables of a recipe's keys.

mkdocs calls the functions whose names begin with `on_`.
"""

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_FIELDS = re.compile(r"<!-- fields of (\S+) (\w+) -->")
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return _FORMULA.sub(lambda found: mathml(found[2], block=found[1] == "div"), content)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A dataclass's docstring and fields where `<!-- fields of FILE CLASS -->` stands."""
    return _FIELDS.sub(lambda found: fields((ROOT / found[1]).read_text(), found[2]), markdown)


def mathml(latex: str, block: bool) -> str:
    """The formula, with the thin spaces around log and the like that the converter leaves out."""
    formula = convert(html.unescape(latex), display="block" if block else "inline")
    return re.sub(
        r"<m[io]>([a-z]{2,})</m[io]>", r'<mo lspace=".17em" rspace=".17em">\1</mo>', formula
    )


def fields(source: str, name: str) -> str:
    """A class's docstring, and name, values, default and comments of its own fields."""
    lines, module = source.splitlines(), ast.parse(source)
    config = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    rows = [
        ast.get_docstring(config) or "",
        "",
        "| key | values | default | |",
        "|---|---|---|---|",
    ]
    for statement in config.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = _values(statement.annotation, _aliases(module))
            if not kind.startswith("ClassVar"):
                told = (kind, _default(statement.value), _comment(lines, statement))
                rows.append(f"| `{statement.target.id}` | {' | '.join(told)} |")
    return "\n".join(rows)


def _aliases(module: ast.Module) -> dict[str, str]:
    """The names of bounded numbers and choices, here or where the trainer has them from."""
    sources = [n.module for n in module.body if isinstance(n, ast.ImportFrom)]
    paths = [ROOT / f"{name.replace('.', '/')}.py" for name in sources if "trainer." in name]
    modules = [module, *(ast.parse(path.read_text()) for path in paths if path.exists())]
    given = [n for m in modules for n in m.body if isinstance(n, ast.Assign)]
    known = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in given}
    return {
        name: kind for name, kind in known.items() if re.match(r"Annotated\[(int|float)|Lit", kind)
    }


def _values(annotation: ast.expr, aliases: dict[str, str]) -> str:
    """What a recipe may hold, from an annotation: `Annotated[int, Field(ge=1)]` as int ≥ 1."""
    kind = re.sub(r"\w+", lambda word: aliases.get(word[0], word[0]), ast.unparse(annotation))
    kind = re.sub(r" \| None", "", kind)
    kind = re.sub(r"Annotated\[(\w+), Field\(min_length=1\)\]", r"\1", kind)
    kind = re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", r"\1 \2", kind)
    kind = re.sub(r"(\w\w)=(\d)", lambda bound: f"{_BOUNDS[bound[1]]} {bound[2]}", kind)
    return re.sub(r"Literal\[(.*?)\]", r"\1", kind).replace("'", "").replace(" | ", " or ")


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):  # field(...)
        made = [k.value for k in value.keywords if k.arg in ("default", "default_factory")]
        value = made[0] if made else None
    written = "" if value is None else ast.unparse(value)
    known = {"True": "true", "False": "false", "None": "", "dict": "{}", "''": ""}
    written = known.get(written, written.strip("'"))
    return f"`{written}`" if written else ""


def _comment(lines: list[str], statement: ast.AnnAssign) -> str:
    """The comments above a field and behind it."""
    above, number = "", statement.lineno - 2
    while lines[number].lstrip().startswith("#"):
        above, number = f"{lines[number].strip(' #')} {above}", number - 1
    assert statement.end_lineno is not None
    behind = lines[statement.end_lineno - 1][statement.end_col_offset :].strip(" #")
    return above + behind

"""Hooks of mkdocs: formulas as MathML, and tables of the keys of a recipe.

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
    """Replace formulas by MathML, which browsers render without a script."""
    return _FORMULA.sub(lambda found: mathml(found[2], block=found[1] == "div"), content)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- fields of FILE CLASS -->` by the docstring and fields of a dataclass."""
    return _FIELDS.sub(lambda found: fields((ROOT / found[1]).read_text(), found[2]), markdown)


def mathml(latex: str, block: bool) -> str:
    """Convert a formula, and add the thin spaces around log and similar names."""
    formula = convert(html.unescape(latex), display="block" if block else "inline")
    return re.sub(
        r"<m[io]>([a-z]{2,})</m[io]>", r'<mo lspace=".17em" rspace=".17em">\1</mo>', formula
    )


def fields(source: str, name: str) -> str:
    """Return the docstring of a class and a table of its own fields, as Markdown."""
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
                cells = (kind, _default(statement.value), _comment(lines, statement))
                rows.append(f"| `{statement.target.id}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _aliases(module: ast.Module) -> dict[str, str]:
    """Return the type aliases of a module and of the trainer's modules that it imports from."""
    names = [n.module or "" for n in module.body if isinstance(n, ast.ImportFrom)]
    paths = [
        ROOT / f"{x.replace('.', '/')}.py" for x in names if x.partition(".")[0] == "opd_trainer"
    ]
    modules = [module, *(ast.parse(path.read_text()) for path in paths if path.exists())]
    assignments = [n for m in modules for n in m.body if isinstance(n, ast.Assign)]
    known = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in assignments}
    return {
        name: kind for name, kind in known.items() if re.match(r"Annotated\[(int|float)|Lit", kind)
    }


def _values(annotation: ast.expr, aliases: dict[str, str]) -> str:
    """Describe the values that an annotation allows: `Annotated[int, Field(ge=1)]` as int ≥ 1."""
    kind = re.sub(r"\w+", lambda word: aliases.get(word[0], word[0]), ast.unparse(annotation))
    kind = re.sub(r" \| None", "", kind)
    kind = re.sub(r"Annotated\[(\w+), Field\(min_length=1\)\]", r"\1", kind)
    kind = re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", r"\1 \2", kind)
    kind = re.sub(r"(\w\w)=(\d)", lambda bound: f"{_BOUNDS[bound[1]]} {bound[2]}", kind)
    return re.sub(r"Literal\[(.*?)\]", r"\1", kind).replace("'", "").replace(" | ", " or ")


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):  # field(...)
        defaults = [k.value for k in value.keywords if k.arg in ("default", "default_factory")]
        value = defaults[0] if defaults else None
    written = "" if value is None else ast.unparse(value)
    known = {"True": "true", "False": "false", "None": "", "dict": "{}", "''": ""}
    written = known.get(written, written.strip("'"))
    return f"`{written}`" if written else ""


def _comment(lines: list[str], statement: ast.AnnAssign) -> str:
    """Return the comments above a field and behind it."""
    above, number = "", statement.lineno - 2
    while lines[number].lstrip().startswith("#"):
        above, number = f"{lines[number].strip(' #')} {above}", number - 1
    assert statement.end_lineno is not None
    behind = lines[statement.end_lineno - 1][statement.end_col_offset :].strip(" #")
    return (above + behind).strip()

"""Hooks of mkdocs: formulas as MathML, and tables of the keys of a recipe.

mkdocs calls the functions whose names begin with `on_`.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from opd_trainer.command.keys import read_group

ROOT = Path(__file__).parents[1]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_FIELDS = re.compile(r"<!-- fields of (\S+) (\w+) -->")


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
    group = read_group(source, name)
    rows = [group.docstring, "", "| key | values | default | |", "|---|---|---|---|"]
    for key in group.keys:
        default = f"`{key.default}`" if key.default else ""
        rows.append(f"| `{key.name}` | {key.values} | {default} | {key.comment} |")
    return "\n".join(rows)

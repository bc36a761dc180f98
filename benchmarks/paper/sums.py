"""Running totals: a task with a checkable answer, the last total, in two formats.

The running totals of the digits 3 4 2 are 3, 7 and 9; each is written as a letter. The plain format
lists the totals. The restated format repeats the digits, lists the totals in other letters, and
ends with the answer in the plain format's letter.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from benchmarks.paper.tasks import LETTERS, Row

DIGITS, LARGEST = 6, 3  # number of digits in a prompt, and the largest digit
Style = Literal["plain", "restated"]
_PLAIN, _OTHER = LETTERS[: DIGITS * LARGEST + 1], LETTERS[-DIGITS * LARGEST - 1 :]


def write(digits: Sequence[int], style: Style) -> str:
    """Return the completion of a prompt in one format."""
    totals = np.cumsum(digits)
    if style == "plain":
        return "".join(_PLAIN[x] for x in totals)
    other = "".join(_OTHER[x] for x in totals)
    return "".join(map(str, digits)) + other + _PLAIN[totals[-1]]


def sums(count: int, seed: int, styles: Sequence[Style] = ()) -> list[Row]:
    """Return rows with prompts and answers, and completions in the styles in turn."""
    rows = []
    prompts = np.random.default_rng(seed).integers(0, LARGEST + 1, (count, DIGITS))
    for number, digits in enumerate(prompts):
        row = {"prompt": "".join(map(str, digits)), "answer": _PLAIN[digits.sum()]}
        if styles:
            row["completion"] = write(digits, styles[number % len(styles)])
        rows.append(row)
    return rows


def answers(text: str, row: Row) -> float:
    """Score 1.0 if the completion ends with the answer, else 0.0."""
    return float(text.endswith(row["answer"]))

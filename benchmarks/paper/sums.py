"""Running totals: a scratchpad task whose answer, the last total, can be checked, in two formats.

Of the digits 3 4 2 the totals are 3, 7 and 9, and a total is written as a letter. The plain
scratchpad is the totals. The restated one says the digits again, then the totals in other letters,
and then the answer as the plain one writes it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from benchmarks.paper.tasks import LETTERS, Row

DIGITS, LARGEST = 6, 3  # of a prompt
Style = Literal["plain", "restated"]
_PLAIN, _OTHER = LETTERS[: DIGITS * LARGEST + 1], LETTERS[-DIGITS * LARGEST - 1 :]


def write(digits: Sequence[int], style: Style) -> str:
    """The completion of a prompt in a format."""
    totals = np.cumsum(digits)
    if style == "plain":
        return "".join(_PLAIN[x] for x in totals)
    other = "".join(_OTHER[x] for x in totals)
    return "".join(map(str, digits)) + other + _PLAIN[totals[-1]]


def sums(count: int, seed: int, styles: Sequence[Style] = ()) -> list[Row]:
    """Prompts with their answers; and completions, in each of the formats in turn."""
    found = []
    every = np.random.default_rng(seed).integers(0, LARGEST + 1, (count, DIGITS))
    for number, digits in enumerate(every):
        row = {"prompt": "".join(map(str, digits)), "answer": _PLAIN[digits.sum()]}
        if styles:
            row["completion"] = write(digits, styles[number % len(styles)])
        found.append(row)
    return found


def answers(text: str, row: Row) -> float:
    """A scorer: 1.0 where the completion ends with the answer."""
    return float(text.endswith(row["answer"]))

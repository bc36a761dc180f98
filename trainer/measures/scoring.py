"""Scorers: a number for a completion of a row, as a reward or on held-out prompts."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from trainer.config import StageConfig, load_function
from trainer.errors import RunStoppedError, explained

Scorer = Callable[[str, dict[str, Any]], float]


def load_scorer(config: StageConfig) -> Scorer | None:
    """The recipe's scorer, of a completion's text and its row."""
    if config.scorer is None:
        return None
    scorer = _VERIFIERS.get(config.scorer) or load_function("scorer", config.scorer, _VERIFIERS)
    pattern = None if config.answer_pattern is None else _pattern(config.answer_pattern)
    return partial(_score, scorer, pattern)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text, re.S)
    except re.error as error:
        raise ValueError(f"answer_pattern: {error} in {text!r}") from None
    if pattern.groups != 1:
        raise ValueError(f"answer_pattern: expected one (group), got {pattern.groups} in {text!r}")
    return pattern


def _score(
    scorer: Scorer, pattern: re.Pattern[str] | None, text: str, row: dict[str, Any]
) -> float:
    answer = ([text] if pattern is None else ["", *pattern.findall(text)])[-1]
    with explained(f"scorer: expected a finite number of {text!r:.80}", RunStoppedError):
        score = scorer(answer, row)
        if isinstance(score, str) or not math.isfinite(score):
            raise ValueError(f"got {score!r:.80}")
        return float(score)


def _column(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None or row[name] != row[name]:  # NaN is a table's word for it
        raise ValueError(f"it needs a column {name}, got {row!r:.200}")
    return row[name]


def _gold(row: dict[str, Any]) -> str:
    answer = _column(row, "answer")
    # A table makes floats of a column of integers where one is missing.
    whole = isinstance(answer, float) and answer.is_integer()
    return str(int(answer) if whole else answer).strip()


def _exact_match(answer: str, row: dict[str, Any]) -> float:
    return float(answer.strip() == _gold(row))


def _math_verify(answer: str, row: dict[str, Any]) -> float:
    from math_verify import parse, verify

    gold = _gold(row)
    bare = not any(mark in gold for mark in ("$", "\\(", "\\[", "\\boxed"))
    return float(verify(parse(f"${gold}$" if bare else gold), parse(answer)))


def _reasoning_gym(answer: str, row: dict[str, Any]) -> float:
    from reasoning_gym import get_score_answer_fn

    task = _column(row, "metadata")["source_dataset"]
    return get_score_answer_fn(task)(answer=answer, entry=row)


_VERIFIERS: dict[str, Scorer] = {
    "exact_match": _exact_match,
    "math_verify": _math_verify,
    "reasoning_gym": _reasoning_gym,
}

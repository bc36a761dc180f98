"""Scorers: numbers for completions, used as reward or on held-out prompts."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from opd_trainer.config import StageConfig, load_function
from opd_trainer.errors import RunStoppedError, convert_errors

Scorer = Callable[[str, dict[str, Any]], float]


def load_scorer(config: StageConfig) -> Scorer | None:
    """Return the config's scorer, a function of a completion's text and its row."""
    if config.scorer is None:
        return None
    scorer = load_function("scorer", config.scorer, _VERIFIERS)
    text = r"\A(.*)\Z" if config.answer_pattern is None else config.answer_pattern
    try:
        pattern = re.compile(text, re.S)
    except re.error as error:
        raise ValueError(f"answer_pattern: {error} in {text!r}") from None
    if pattern.groups != 1:
        raise ValueError(f"answer_pattern: expected one (group), got {pattern.groups} in {text!r}")
    return partial(_score, scorer, pattern)


def _score(scorer: Scorer, pattern: re.Pattern[str], text: str, row: dict[str, Any]) -> float:
    answer = ["", *pattern.findall(text)][-1]
    with convert_errors(f"scorer: expected a finite number of {text!r:.80}", RunStoppedError):
        score = scorer(answer, row)
        if isinstance(score, str) or not math.isfinite(score):
            raise ValueError(f"got {score!r:.80}")
        return float(score)


def _column(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None or row[name] != row[name]:  # a table has NaN for a missing value
        raise ValueError(f"it needs a column {name}, got {row!r:.200}")
    return row[name]


def _reference(row: dict[str, Any]) -> str:
    answer = _column(row, "answer")
    # A table converts a column of integers to floats if one value is missing.
    is_whole = isinstance(answer, float) and answer.is_integer()
    return str(int(answer) if is_whole else answer).strip()


def exact_match(answer: str, row: dict[str, Any]) -> float:
    return float(answer.strip() == _reference(row))


def math_verify(answer: str, row: dict[str, Any]) -> float:
    from math_verify import parse, verify

    reference = _reference(row)
    is_bare = not any(mark in reference for mark in ("$", "\\(", "\\[", "\\boxed"))
    return float(verify(parse(f"${reference}$" if is_bare else reference), parse(answer)))


def reasoning_gym(answer: str, row: dict[str, Any]) -> float:
    from reasoning_gym import get_score_answer_fn

    task = _column(row, "metadata")["source_dataset"]
    return get_score_answer_fn(task)(answer=answer, entry=row)


_VERIFIERS = {scorer.__name__: scorer for scorer in (exact_match, math_verify, reasoning_gym)}

"""Scorers: a number for a completion of a row, as a reward or on held-out prompts."""

import importlib
import math
import re
import runpy
from collections.abc import Callable
from functools import partial
from typing import Any

from trainer.config import StageConfig

Scorer = Callable[[str, dict[str, Any]], float]


def load_scorer(config: StageConfig) -> Scorer | None:
    """The recipe's scorer, of a completion's text and its row."""
    if config.scorer is None:
        return None
    is_named = config.scorer in _VERIFIERS
    scorer = partial(_verified, config.scorer) if is_named else _function(config.scorer)
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern, re.S)
    if pattern and pattern.groups != 1:
        raise ValueError(
            f"answer_pattern: expected one (group), got {pattern.groups} in {pattern.pattern!r}"
        )
    return partial(_score, scorer, pattern)


def _score(
    scorer: Scorer, pattern: re.Pattern[str] | None, text: str, row: dict[str, Any]
) -> float:
    answer = ([text] if pattern is None else ["", *pattern.findall(text)])[-1]
    score = float(scorer(answer, row))
    if not math.isfinite(score):
        raise ValueError(f"scorer: expected a finite number, got {score} of {text!r:.80}")
    return score


def _exact_match(answer: str, row: dict[str, Any]) -> float:
    return float(answer.strip() == str(row["answer"]).strip())


def _math_verify(answer: str, row: dict[str, Any]) -> float:
    from math_verify import parse, verify

    gold = str(row["answer"])
    bare = not any(mark in gold for mark in ("$", "\\(", "\\[", "\\boxed"))
    return float(verify(parse(f"${gold}$" if bare else gold), parse(answer)))


def _reasoning_gym(answer: str, row: dict[str, Any]) -> float:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(row["metadata"]["source_dataset"])(answer=answer, entry=row)


_VERIFIERS: dict[str, tuple[Scorer, str]] = {
    "exact_match": (_exact_match, "answer"),
    "math_verify": (_math_verify, "answer"),
    "reasoning_gym": (_reasoning_gym, "metadata"),
}


def _verified(name: str, answer: str, row: dict[str, Any]) -> float:
    scorer, column = _VERIFIERS[name]
    if column not in row:
        raise ValueError(f"scorer: {name} needs a column {column}, got {', '.join(row)}")
    return scorer(answer, row)


def _function(reference: str) -> Scorer:
    """The function of file.py:function or module:function."""
    source, _, name = reference.partition(":")
    functions = runpy.run_path(source) if source.endswith(".py") else _module(source, reference)
    if name not in functions:
        expected = ", ".join(_VERIFIERS)
        raise ValueError(
            f"scorer: expected {expected}, file.py:function or module:function, got {reference!r}, "
            "which has no such function"
        )
    return functions[name]


def _module(name: str, reference: str) -> dict[str, Any]:
    try:
        return vars(importlib.import_module(name))
    except ModuleNotFoundError as error:
        raise ValueError(f"scorer: {error} in {reference!r}") from None

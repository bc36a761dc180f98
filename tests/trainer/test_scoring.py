"""Scorers: what they accept, and the error message of every mistake."""

import pytest

from opd_trainer.config import RLVRConfig, load_config
from opd_trainer.data import Limits, PromptReader, load_rows
from opd_trainer.errors import RunStoppedError
from opd_trainer.measures.scoring import load_scorer
from tests.tiny_run import NO_TEACHER, tiny_tokenizer, write_recipe

BASE = NO_TEACHER | {"completions_per_prompt": 2}


def _scorer(tmp_path, scorer, **changes):
    return load_scorer(
        load_config(RLVRConfig, write_recipe(tmp_path, **BASE, scorer=scorer, **changes), [])
    )


@pytest.mark.parametrize(
    ("scorer", "answer", "text", "score"),
    [
        ("exact_match", "4", " 4\n", 1.0),
        ("exact_match", 4, "4", 1.0),
        ("exact_match", 4.0, "4", 1.0),
        ("exact_match", 4.5, "4.5", 1.0),
        ("exact_match", "4", "4.", 0.0),
        ("math_verify", "\\frac{1}{2}", "so it is $0.5$", 1.0),
        ("math_verify", "2x+1", "$1+2x$", 1.0),
        ("math_verify", "3", "4", 0.0),
        ("math", "3", "4", None),
    ],
)
def test_named_scorers(tmp_path, scorer, answer, text, score):
    if score is None:
        with pytest.raises(ValueError, match="expected exact_match, math_verify, reasoning_gym, f"):
            _scorer(tmp_path, scorer)
        return
    assert _scorer(tmp_path, scorer)(text, {"answer": answer}) == score


def test_the_last_match_of_the_pattern_is_scored(tmp_path):
    scorer = _scorer(tmp_path, "exact_match", answer_pattern=r"answer: (\S+)")
    assert scorer("answer: 3, no, answer: 4", {"answer": "4"}) == 1
    assert scorer("4", {"answer": "4"}) == 0
    with pytest.raises(ValueError, match=r"answer_pattern: expected one \(group\), got 0"):
        _scorer(tmp_path, "exact_match", answer_pattern="x")
    with pytest.raises(ValueError, match=r"answer_pattern: missing \), .* in '\('"):
        _scorer(tmp_path, "exact_match", answer_pattern="(")
    with pytest.raises(RunStoppedError, match=r"scorer: .* it needs a column answer"):
        scorer("None", {"answer": None})


def test_reasoning_gym_makes_the_data_and_scores_it(tmp_path):
    source = "reasoning_gym:chain_sum?size=5&seed=3&max_terms=2"
    rows = load_rows(source)
    assert len(rows) == 5
    assert rows == load_rows(source)
    scorer = _scorer(tmp_path, "reasoning_gym")
    for row in rows:
        left, right = row["metadata"]["expression"].split(" ", 1)
        assert scorer(str(eval(left + right)), row) == 1
        assert scorer("no number", row) < 1
    config = load_config(RLVRConfig, write_recipe(tmp_path, **BASE), [])
    prompts = PromptReader(config, tiny_tokenizer(), Limits(256, 97), {}).read(source)
    assert prompts[0].row["answer"] == rows[0]["answer"]
    assert prompts[0].text == rows[0]["question"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:no_such_task", "reasoning_gym:no_such_task: "),
        ("reasoning_gym:chain_sum?colour=3", r"reasoning_gym:chain_sum\?colour=3: .*colour"),
    ],
)
def test_a_wrong_task_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_rows(source)


def test_functions_by_file_and_module(tmp_path):
    (tmp_path / "own.py").write_text("def f(text, row):\n    return len(text) / row['n']\n")
    assert _scorer(tmp_path, f"{tmp_path}/own.py:f")("abc", {"n": 2}) == 1.5
    assert _scorer(tmp_path, "operator:eq")("a", "a") == 1
    for reference in (f"{tmp_path}/own.py:g", "operator:nothing", "no_such_module:f"):
        with pytest.raises(ValueError, match="scorer: "):
            _scorer(tmp_path, reference)
    (tmp_path / "bad.py").write_text("def f(text, row):\n    return float('nan')\n")
    message = "scorer: expected a finite number of 'abc'; got nan"
    with pytest.raises(RunStoppedError, match=message):
        _scorer(tmp_path, f"{tmp_path}/bad.py:f")("abc", {})


def test_a_missing_answer_is_named(tmp_path):
    message = r"scorer: .* it needs a column answer, got .*'prompt'"
    with pytest.raises(RunStoppedError, match=message):
        _scorer(tmp_path, "exact_match")("4", {"prompt": "x"})

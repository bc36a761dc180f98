"""Two of the paper's claims in short runs, and the parts of `python -m benchmarks.paper`."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.paper import foreign_habits, self_distillation
from benchmarks.paper.__main__ import CLAIMS
from benchmarks.paper.counting import BIASED, BUCKET, STOPPED, Counting
from benchmarks.paper.page import Claim, Finding, is_below, spread, write_page
from benchmarks.paper.runs import Laboratory, curve, first, last
from benchmarks.paper.self_distillation import (
    FORWARD,
    REVERSE,
    Distances,
    closed_forms,
    compare,
    measure,
)
from benchmarks.paper.tasks import LETTERS, Language, counts_on, follows_rule, shuffled, with_rules


def test_a_biased_gradient_collapses_the_student_and_stop_gradient_does_not(tmp_path):
    """The main contrast of claim 1, with one seed and half of the steps."""
    short = {"max_steps": 30, "eval_steps": 30, "learning_rate": 1e-3}
    with Laboratory(tmp_path) as lab:
        counting = Counting(lab)
        lab.measure([counting.student(1), counting.teacher(1)], "models")
        runs = [counting.distill(x, 3, 1, **short) for x in (BIASED, STOPPED, BUCKET)]
        biased, *proper = lab.measure(runs, "objectives")
    share = last(biased, "student_mass") / last(biased, "teacher_mass")
    assert abs(share - 1 / math.e) < 0.1
    for name in ("eval_reverse_kl", "eval_completion_length"):
        assert last(biased, name) > 1.2 * first(biased, name)
    assert last(biased, "eval_score") < 0.7 * first(biased, "eval_score")
    for lines in proper:
        assert last(lines, "student_mass") > 0.95 * last(lines, "teacher_mass")
        assert last(lines, "eval_reverse_kl") < first(lines, "eval_reverse_kl")
        assert last(lines, "eval_score") > first(lines, "eval_score")


def test_students_of_several_teachers_end_at_their_means(tmp_path):
    """The closed forms of claim 5, with one seed and half of the steps."""
    with Laboratory(tmp_path) as lab:
        measured = measure(lab, [1], kinds=(REVERSE, FORWARD), steps=60, base_steps=200)
    assert [x for x in closed_forms(measured.distances) if not x.holds] == []


def test_distances_of_known_distributions():
    """They agree with the definitions, and are 0 if the student is the geometric mean itself."""
    q = torch.tensor([[[0.7, 0.2, 0.1]], [[0.2, 0.2, 0.6]]], dtype=torch.float64)
    unnormalised = (q[0] * q[1]).sqrt()
    z = float(unnormalised.sum())
    found = compare((unnormalised / z).log(), q.log())
    assert found.to_geometric == pytest.approx(0, abs=1e-12)
    assert found.reverse_kl == pytest.approx(found.residual)
    assert found.residual == pytest.approx(-math.log(z))
    found = compare(q.mean(0).log(), q.log())
    assert found.to_arithmetic == pytest.approx(0, abs=1e-12)
    assert found.to_geometric == pytest.approx(
        float((unnormalised / z - q.mean(0)).abs().sum()) / 2
    )
    assert found.reverse_kl > found.residual


def test_languages_prefer_the_steps_that_they_rank_first():
    language = replace(shuffled(3), exponent=1.2)
    assert sorted(language.ranked()) == list(range(1, 49))
    assert language.ranked()[:20] != list(range(1, 21))
    counts = np.zeros(49)
    for row in language.rows(600, seed=5):
        letters = row["prompt"] + row["completion"]
        for one, other in pairwise(letters):
            counts[(LETTERS.index(other) - LETTERS.index(one) - 1) % 48 + 1] += 1
    share = np.arange(1, 49) ** -1.2
    expected = (share / share.sum())[0]
    most_likely = language.ranked()[0]
    assert counts.argmax() == most_likely
    assert counts[most_likely] / counts.sum() == pytest.approx(expected, rel=0.1)
    assert Language().rows(9, seed=1) == Language().rows(9, seed=1)


@pytest.mark.parametrize(
    ("first_letter", "text", "score"),
    [("i", "jkl", 1.0), ("i", "jk", 2 / 3), ("l", "", 1.0), ("l", "m", 0.0), ("i", "kl", 2 / 3)],
)
def test_scores_are_shares_of_right_letters_and_ends(first_letter, text, score):
    assert counts_on(text, {"prompt": first_letter}) == pytest.approx(score)


def test_rules_come_with_their_rows():
    rows = with_rules(10, (1, 3))
    assert [(x["prompt"], x["privileged_context"]) for x in rows[:3]] == [
        ("a", "1"), ("a", "3"), ("b", "1"),
    ]  # fmt: skip
    assert follows_rule("dgj", {"prompt": "a", "rule": 3}) == 0.75  # j does not end
    assert follows_rule("d5", {"prompt": "a", "rule": 3}) == pytest.approx(1 / 3)


def test_a_run_is_kept_until_its_inputs_change(tmp_path):
    with Laboratory(tmp_path) as lab:
        student = Counting(lab).sft("tiny", 1, lambda: Language().rows(64, 1), steps=2)
        (lines,) = lab.measure([student], "once")
        assert curve(lines, "train_loss")[0] == [2]
        (tmp_path / "counting" / "tiny-1" / "metrics.jsonl").unlink()
        assert lab.measure([student], "again") == [lines]
        other = replace(student, changes=student.changes | {"learning_rate": 1e-3})
        assert other.result() is None
        assert replace(student, needs=(other,)).result() is None
        broken = replace(student, changes=student.changes | {"k": "three"})
        with pytest.raises(
            RuntimeError, match=r"tiny-1: .*k: input should be .*'three'.*see its log\.txt"
        ):
            lab.measure([broken], "broken")


class FakeLine(dict):
    """A log line in which every metric has the same value."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return self["value"]


def test_every_claim_reports_what_its_runs_logged(tmp_path, monkeypatch):
    lines = [FakeLine(step=0, value=0.25), FakeLine(step=60, value=0.5)]
    monkeypatch.setattr(Laboratory, "measure", lambda lab, runs, label: [lines for _ in runs])
    monkeypatch.setattr(foreign_habits, "trace_nll_of", lambda models, run: [0.75] * len(models))
    monkeypatch.setattr(self_distillation, "distances", lambda run: Distances(0.1, 0.2, 0.3, 0.4))
    with Laboratory(tmp_path / "runs") as lab:
        claims = [claim(lab, [1, 2], tmp_path) for claim in CLAIMS.values()]
    text = write_page(claims, tmp_path, [1, 2]).read_text()
    assert all(f"\n## {number}. " in text for number in CLAIMS)
    assert all(claim.figure.stat().st_size > 10_000 for claim in claims)
    assert "{" not in text
    assert "| stop-gradient | 3 | 0.0003 | 0.50 | 0.50 | 0.50 | 0.18 | 0.50 | 0.50 |" in text
    assert "| 30 | 0.50 | 0.50 | 0.50 | 0 | 0 | 0 | 0 |" in text
    assert "| larger, same format | 0.50 | 0.25 | 0.50 | 0.25 | 0.50 | 0.25 | 0.50 |" in text
    assert "| SFT, then OPD | 0.50 | 0.50 | 0.75 |" in text
    assert "| own rules, reverse KL | 0.100 | 0.200 | 0.300 | 0.400 |" in text
    assert "| stop-gradient, K = 3: accuracy rises | yes | 0.25 below 0.50 |" in text


def test_the_page_shows_findings_that_do_not_hold(tmp_path):
    findings = [Finding("it rises", True, "1 below 2"), Finding("it falls", False, "2 below 1"),
                Finding("it stays", False, "-", asserted=False)]  # fmt: skip
    claim = Claim(5, ["| a |"], {}, tmp_path / "figure.png", findings)
    text = write_page([claim], tmp_path, [1, 2, 3]).read_text()
    assert "from 3 seeds" in text
    assert "| it falls | **no** | 2 below 1 |" in text
    assert "| it stays | **no** (reported only) | - |" in text
    assert [x.text for x in claim.failures()] == ["it falls"]
    assert is_below([1, 2], [3, 4])
    assert not is_below([1, 3], [2, 4])
    assert (spread([0.1, 0.3]), spread([2.0])) == ("0.20 (0.10 to 0.30)", "2.00")

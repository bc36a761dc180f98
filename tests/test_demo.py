"""The first command of the README on the real 135M model, in `make test-slow`."""

import json
import time

import pytest

from opd_trainer.__main__ import main


@pytest.mark.slow
def test_the_demo_internalises_its_rule(tmp_path):
    start = time.monotonic()
    main(["distill", "recipes/demo.yaml", "--output_dir", str(tmp_path / "run")])
    assert time.monotonic() - start < 12 * 60
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if "eval_reverse_kl" in line]
    before, after = evaluations[0], evaluations[-1]
    assert after["eval_reverse_kl"] <= 0.65 * before["eval_reverse_kl"]
    assert (
        after["eval_reverse_kl_on_own_samples"] <= 0.65 * before["eval_reverse_kl_on_own_samples"]
    )
    assert before["eval_score"] < 0.1
    assert after["eval_score"] >= 0.35

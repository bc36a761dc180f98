"""The benchmarks measure what they claim, and the losses stay within bounds of memory."""

import json
import math
import re

import pytest
import torch

from benchmarks import roofline, sweeps
from benchmarks.__main__ import main
from benchmarks.measurement import MIB, Measurement, measure
from benchmarks.problems import Inputs, Problem
from benchmarks.providers import DISTILLATION, LABELS
from benchmarks.trainer_step import agreement
from tests.tiny_run import write_model

TINY = Problem(tokens=8, dim=16, vocab=1024, k=1024)


@pytest.mark.parametrize(("provider", "bound"), [("ours_recompute", 64), ("ours_one_pass", 256)])
def test_peak_extra_memory_at_a_large_vocabulary(provider, bound):
    """N = 1,024, V = 151,936: one logits tensor alone would be 594 MiB."""
    measured = measure(Problem(1024, 256, 151_936), [provider], rounds=0)
    assert measured[provider].peak_extra_bytes <= bound * MIB


def test_the_benchmark_sees_full_logits():
    measured = measure(Problem(256, 64, 50_000), ["eager_full"], rounds=0)
    assert measured["eager_full"].peak_extra_bytes >= 2 * 256 * 50_000 * 4


@pytest.mark.parametrize("family", [DISTILLATION, LABELS], ids=["distillation", "labels"])
def test_providers_do_the_same_work(family):
    """With K = V every reverse KL is the full one, so losses and gradients agree, also of peers."""
    for peer in ("liger_kernel", "trl"):
        pytest.importorskip(peer)
    results = {}
    for name, provider in family.items():
        # The floor has no loss, cut_labels compiles for minutes, and quack_labels needs a GPU.
        if name in ("floor", "cut_labels", "quack_labels"):
            continue
        inputs = Inputs.make(TINY)
        loss = provider(inputs)
        loss.backward()
        results[name] = (loss.detach(), inputs.student.hidden.grad, inputs.student.weight.grad)
    expected = results["eager_full" if family is DISTILLATION else "eager_labels"]
    assert len(results) >= 3
    for actual in results.values():
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_floor_is_the_four_products():
    inputs = Inputs.make(TINY)
    DISTILLATION["floor"](inputs).backward()
    hidden, weight = inputs.student.hidden, inputs.student.weight
    logits = (hidden @ weight.T).detach()
    torch.testing.assert_close(hidden.grad, logits @ weight.detach())
    torch.testing.assert_close(weight.grad, logits.T @ hidden.detach())


def test_inputs_are_as_peaked_as_the_models_samples():
    problem = Problem(tokens=256, dim=256, vocab=49_152)
    p = Inputs.make(problem).student.detach().materialize().softmax(-1)
    assert 200 < (p >= 2.0**-14).sum(-1).double().mean() < 350  # 275 on SmolLM2


def test_roofline_writes_a_table_records_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "GPUS", {"H100": roofline.GPUS["H100"]})
    monkeypatch.setattr(roofline, "bf16_chunk", lambda: "bf16")
    arguments = ["benchmarks", "roofline", "--gpus", "H100", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "a model by flops and bytes, not a measurement" in capsys.readouterr().out.lower()
    rows = json.loads((tmp_path / "roofline.json").read_text())
    assert {row["head"] for row in rows} == set(roofline.SHAPES)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    for head in roofline.SHAPES:
        for tokens in roofline.TOKENS:
            group = [r for r in rows if (r["head"], r["tokens"]) == (head, tokens)]
            assert all(r["ratio"] >= 1 for r in group)
            ours = [r for r in group if r["provider"] in ("ours_one_pass", "ours_recompute")]
            (chosen,) = [r for r in group if r["chosen"]]
            assert chosen["seconds"] <= 1.05 * min(
                r["seconds"] for r in ours
            )  # the choice ignores the teacher


def test_a_bf16_chunk_rounds_what_a_float32_chunk_keeps():
    text = roofline.bf16_chunk(tokens=8)
    numbers = [float(x) for x in re.findall(r"\d\.\de[+-]\d+", text)]
    loss_16, loss, gradient_16, gradient = numbers
    assert loss < 1e-4 < loss_16
    assert gradient < 1e-4 < gradient_16


def test_compare_writes_tables_records_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.compare.HEADS", {"SmolLM2-135M": (16, 2048)})
    monkeypatch.setattr(sweeps, "BASE", Problem(8, 16, 2048))
    monkeypatch.setattr(sweeps, "SWEEPS", {"k": [1, 4]})
    monkeypatch.setattr(sweeps, "PROVIDERS", ["ours_one_pass", "eager_topk"])
    arguments = ["compare", "--heads", "SmolLM2-135M", "--tokens", "16", "--rounds", "3"]
    arguments += ["--providers", "floor", "ours_one_pass", "--sweeps", "k"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments, "--output", str(tmp_path)])
    main()
    records = json.loads((tmp_path / "compare.json").read_text())
    assert [r["provider"] for r in records] == ["floor", "ours_one_pass"]
    assert all(len(r["forward"]) == 3 and min(r["forward"] + r["backward"]) > 0 for r in records)
    table = (tmp_path / "compare.md").read_text()
    assert table.splitlines()[-2].split("|")[5].strip() == "1.000"
    assert table.splitlines()[-3:] == capsys.readouterr().out.split("\n\n")[1].splitlines()[-3:]
    points = json.loads((tmp_path / "sweep_k.json").read_text())
    assert {(p["provider"], p["k"]) for p in points} == {
        (provider, k) for provider in ("ours_one_pass", "eager_topk") for k in (1, 4)
    }
    assert (tmp_path / "sweep_k.png").read_bytes().startswith(b"\x89PNG")


def test_dtypes_alternate_in_the_same_rounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.compare.HEADS", {"SmolLM2-135M": (16, 2048)})
    arguments = ["compare", "--heads", "SmolLM2-135M", "--tokens", "16", "--rounds", "2"]
    arguments += ["--dtypes", "float32", "bfloat16", "--providers", "ours_one_pass", "--sweeps"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments, "--output", str(tmp_path)])
    main()
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert lines[2].endswith("K = 20, float32, bfloat16**")
    rows = [line.split("|")[1].strip() for line in lines[-2:]]
    assert rows == ["ours_one_pass, float32", "ours_one_pass, bfloat16"]
    records = json.loads((tmp_path / "compare.json").read_text())
    found = [(r["provider"], r["dtype"], len(r["forward"])) for r in records]
    assert found == [("ours_one_pass", "float32", 2), ("ours_one_pass", "bfloat16", 2)]


def test_a_provider_that_cannot_run_is_left_out_with_its_reason(monkeypatch, capsys):
    measured = measure(Problem(8, 16, 2048, k=4096), ["floor", "ours_one_pass"], rounds=1)
    assert list(measured) == ["floor"]
    assert "k: expected 1 to 2048" in capsys.readouterr().err


def test_medians_are_of_whole_passes_and_ratios_of_the_same_round():
    slow, fast = (
        Measurement([1.0, 5.0, 3.0], [9.0, 1.0, 4.0], 0),
        Measurement([5.0, 1.0, 7.0], [0.0] * 3, 0),
    )
    assert slow.median() == 7.0
    assert slow.ratio(fast) == 2.0


def test_trainer_step_does_the_same_work_as_trl(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    model = write_model(tmp_path / "model", max_position_embeddings=512)
    arguments = ["trainer_step", "--cases", "mixed", "rollout", "--model", str(model)]
    arguments += ["--prompts", "4", "--tokens", "8", "--micro-batch-size", "2", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments, "--output", str(tmp_path)])
    main()
    records = json.loads((tmp_path / "trainer_step.json").read_text())
    names = ["trl", "ours_full", "ours_topk"]
    cases = [(case, name) for case in ("mixed", "rollout") for name in names]
    assert [(r["case"], r["provider"]) for r in records] == cases
    for r in records:
        assert all(len(times) == 2 and min(times) > 0 for times in (r["rollout"], r["learning"]))
        if r["case"] == "mixed" and r["provider"] != "ours_topk":
            assert r["agreement"]["loss"] <= 1e-5
            assert 0 < r["agreement"]["gradient"] <= 1e-3
    text = (tmp_path / "trainer_step.md").read_text()
    _, *sections = text.rstrip("\n").split("\n\n")
    assert sections == capsys.readouterr().out.rstrip("\n").split("\n\n")


def test_steps_that_differ_are_not_compared():
    gradients = {"a": torch.ones(2), "b": torch.tensor([3.0, 4.0])}
    other = gradients | {"b": torch.tensor([3.0, 4.1])}
    close = agreement((2.0, 2.0 + 1e-6), (gradients, other))
    assert close.loss == pytest.approx(5e-7)
    assert close.gradient == pytest.approx(0.02)
    for losses, second in (
        ((2.0, 2.0), other),
        ((2.0, 2.1), gradients),
        ((2.0, math.nan), gradients),
    ):
        with pytest.raises(RuntimeError, match="not the same work"):
            agreement(losses, (gradients, second)).check("a and b")

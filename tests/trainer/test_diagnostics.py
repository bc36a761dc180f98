"""Diagnostics and alarms, the privileged context, the prefix probe and the preflight."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, SparseLogits
from opd_trainer.__main__ import main
from opd_trainer.config import DistillationConfig, RLVRConfig, load_config
from opd_trainer.measures.diagnostics import Sums, across_contexts, alarms, repetition, spread
from opd_trainer.models.rollout import Completion
from tests.tiny_run import make_trainer, read_metrics, write_model, write_recipe


def _pair(tokens=7, vocab=23, k=5):
    torch.manual_seed(0)
    student, teacher = (
        LazyLogits(torch.randn(tokens, 6, dtype=torch.float64), torch.randn(vocab, 6).double())
        for _ in range(2)
    )
    return student, teacher, student.topk(k, entropy=True)


def test_the_teachers_view_of_the_sampled_tokens():
    _, teacher, top = _pair()
    log_q = teacher.materialize().log_softmax(-1)
    ids = torch.arange(7) * 3
    sums = Sums()
    sums.add_positions(top, teacher, ids, [4, 3])
    nll = -log_q.gather(-1, ids[:, None])[:, 0]
    best = log_q.topk(5).indices
    means = sums.means()
    assert means["teacher_nll"] == pytest.approx(float(nll.mean()))
    assert means["teacher_nll_from_0"] == pytest.approx(float(nll.mean()))
    assert means["teacher_entropy"] == pytest.approx(float(-(log_q.exp() * log_q).sum(-1).mean()))
    outside = (best != ids[:, None]).all(-1).double().mean()
    assert means["outside_teacher_top_k"] == pytest.approx(float(outside))
    shared = (top.ids[:, :, None] == best[:, None]).any(-1).double().mean()
    assert means["overlap"] == pytest.approx(float(shared))
    assert not any("from_16" in name for name in means)


def test_figures_by_position_are_of_the_tokens_there():
    torch.manual_seed(1)
    _, teacher, top = _pair(tokens=90)
    log_q = teacher.materialize().log_softmax(-1)
    ids = torch.randint(0, 23, (90,))
    nll = -log_q.gather(-1, ids[:, None])[:, 0]
    sums = Sums()
    sums.add_positions(top, teacher, ids, [70, 20])
    means = sums.means()
    for first, rows in ((0, [*range(16), *range(70, 86)]), (16, [*range(16, 64), *range(86, 90)]),
                        (64, [*range(64, 70)])):  # fmt: skip
        assert means[f"teacher_nll_from_{first}"] == pytest.approx(float(nll[rows].mean()))
    assert "teacher_nll_from_256" not in means


def test_the_bias_term_is_compared_with_the_gradient_by_autograd():
    """Per token, the gradient on S of the top-K reverse KL with and without stop-gradient."""
    student, teacher, top = _pair()
    t = teacher.gather(top.ids)
    sums = Sums()
    sums.add_tokens(top, t)
    sums.add(scored_tokens=7)
    z, log_q = student.materialize(), t.log_probs

    def gradient(stop):
        leaf = z.clone().requires_grad_()
        log_p = leaf.log_softmax(-1).gather(-1, top.ids)
        weight = log_p.detach() if stop else log_p
        (log_p.exp() * (weight - log_q)).sum().backward()
        return leaf.grad.gather(-1, top.ids)

    plain, biased = gradient(True), gradient(False)
    expected = (biased - plain).norm(dim=-1).sum() / plain.norm(dim=-1).sum()
    assert sums.means()["bias_ratio"] == pytest.approx(float(expected))


def test_repetition_counts_the_3_grams_that_occurred_before():
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([5] * 10) == pytest.approx(7 / 8)
    assert repetition([1, 2]) == 0


QUIET = {"loss": 1.0, "repetition": 0.1, "truncated": 0.1, "student_mass": 0.99,
         "outside_teacher_top_k": 0.1, "skipped_steps": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "alarm"),
    [
        ({}, {}, ""),
        ({"repetition": 0.5}, {}, "Repetition: 34% of 3-grams occurred before, after 10% at"),
        ({"truncated": 0.6}, {}, "Truncated: 50% of completions do not end, after 10% at the"),
        ({"outside_teacher_top_k": 0.5}, {}, "Mismatch: 34% of the student's tokens are outside"),
        ({"student_mass": 0.6}, {"stop_gradient": False}, "Biased gradient: .* 0.99 to 0.83, as"),
        ({"student_mass": 0.6}, {"tail": "bucket"}, ""),
        ({"skipped_steps": 1.0}, {}, "Not finite: a step was left out"),
    ],
)
def test_an_alarm_is_raised_once_when_a_trend_shows_a_way_to_fail(
    tmp_path, changes, options, alarm
):
    """The values in an alarm are means over the first and the last five lines."""
    config = load_config(DistillationConfig, write_recipe(tmp_path, **{"tail": None} | options), [])
    lines, raised = [], []
    for step in range(20):
        lines.append(QUIET | (changes if step >= 8 else {}))
        if text := alarms(config, lines):
            lines[-1] = lines[-1] | {"alarm": text}
            raised.append((step, text))
        lines.append({"eval_score": 1.0})
    texts = " ".join(text for _, text in raised)
    if not alarm:
        assert not raised
        return
    assert re.search(alarm, texts)
    assert texts.count(alarm.split(":")[0]) == 1
    assert all(step > 8 for step, text in raised if "at the start" in text)


def test_the_geometric_mean_is_the_best_that_cannot_see_the_context():
    """-log Z is the smallest mean reverse KL; the dispersion is the mean KL to the average."""
    torch.manual_seed(0)
    rows = torch.randn(3, 4, 9, dtype=torch.float64).log_softmax(-1)
    dispersion, residual = spread(rows)
    geometric = rows.mean(0).log_softmax(-1)
    average = rows.exp().mean(0)
    assert_close(residual, (geometric.exp() * (geometric - rows)).sum(-1).mean(0))
    assert_close(dispersion, (rows.exp() * (rows - average.log())).sum(-1).mean(0))
    for _ in range(20):
        other = (geometric + 0.1 * torch.randn_like(geometric)).log_softmax(-1)
        assert ((other.exp() * (other - rows)).sum(-1).mean(0) > residual).all()


def test_contexts_of_the_same_prompt_are_compared(tmp_path):
    write_recipe(tmp_path)
    contexts = ["be brief", "be long", "sing"]
    rows = [{"prompt": "say 1", "privileged_context": c} for c in contexts]
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["distill", str(write_recipe(tmp_path, eval_data=str(path), max_steps=1, k=97))])
    _, lines = read_metrics(tmp_path / "run")
    first = lines[0]
    assert first["eval_context_dispersion"] > 0
    assert first["eval_geometric_residual"] > 0
    # Before training, the student is the teacher without its context.
    assert first["eval_context_kl"] == pytest.approx(first["eval_reverse_kl"], rel=1e-4)
    assert "eval_context_kl" not in lines[-1]


def test_contexts_of_several_teachers_are_averaged_over_their_tokens(tmp_path):
    write_recipe(tmp_path)
    for name, seed in (("a", 3), ("b", 4)):
        write_model(tmp_path / name, seed=seed)
    rows = [
        {"prompt": "say 1", "privileged_context": c, "teacher": t}
        for c in ("be brief", "sing")
        for t in ("a", "b")
    ]
    path = tmp_path / "routed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"teacher": {name: str(tmp_path / name) for name in "ab"}, "k": 97}
    trainer = make_trainer(tmp_path, **options, eval_data=str(path), train_data=str(path))
    evaluation = trainer.evaluation
    evaluation.references = evaluation.complete_by_teachers(evaluation.prompts, 7)
    own = {n: [c for c in evaluation.references if c.prompt.teacher == n] for n in "ab"}
    (a,), (b,) = (across_contexts(trainer.teachers[n], own[n], 97, 1.0) for n in "ab")
    metrics = evaluation._contexts()
    for name, first, second in zip(
        ("eval_context_dispersion", "eval_geometric_residual"), a, b, strict=True
    ):
        assert metrics[name] == pytest.approx(float(torch.cat([first, second]).mean()))
        assert float(first.mean()) != pytest.approx(float(second.mean()), rel=0.01)


def test_the_prefix_probe_counts_what_the_teacher_turns(tmp_path):
    trainer = make_trainer(tmp_path)
    evaluation = trainer.evaluation
    prompts = evaluation.prompts * 8
    scores = [1.0, 0.0] * 8
    own = [Completion(p, [20 + i, 30, 31, 32], False, reward=scores[i])
           for i, p in enumerate(prompts)]  # fmt: skip
    seen = []

    def score(text, row):
        seen.append(text.replace(" ", ""))
        return float(seen[-1][:1] in "opqr")

    evaluation.scorer = score
    tokenizer = trainer.sampler.tokenizer
    # Alone, the teacher is right on the first prompt and wrong on the second.
    alone = [tokenizer.get_vocab()[x] for x in "oa"]
    evaluation.references = [
        Completion(p, [first, 30], False)
        for p, first in zip(evaluation.prompts, alone, strict=True)
    ]
    by_teacher = evaluation.scored(evaluation.references)
    seen.clear()
    metrics = evaluation._prefix_probe(own, by_teacher)
    firsts = [tokenizer.decode([20 + i]) for i in range(16)]
    assert [text[0] for text in seen] == firsts  # each continuation begins with its own prefix
    right = [f in "opqr" for f in firsts]
    lost = sum(a == 1 and not b for a, b in zip(scores, right, strict=True))
    won = sum(a == 0 and b for a, b in zip(scores, right, strict=True))
    assert metrics["eval_probe_right_to_wrong"] == lost
    assert metrics["eval_probe_wrong_to_right"] == won
    assert metrics["eval_probe_teacher_right_to_wrong"] == sum(not b for b in right[::2])
    assert metrics["eval_probe_teacher_wrong_to_right"] == sum(right[1::2]) > 0
    assert metrics["eval_probe_score"] == pytest.approx(sum(right) / 16)
    ended = [Completion(p, [2], False) for p in prompts]
    assert evaluation._prefix_probe(ended, by_teacher) == {}
    seen.clear()
    evaluation._prefix_probe([ended[0], *own[1:]], by_teacher)
    assert len(seen) == 15


def test_the_preflight_tells_what_is_bad_before_training(tmp_path, capsys, monkeypatch):
    main(["distill", str(write_recipe(tmp_path, max_steps=1, tail=None))])
    output = capsys.readouterr().out
    assert "preflight: memory: 0.0 GiB of weights" in output
    assert "preflight: gap: reverse KL of " in output
    assert "of the student's mass. The support holds less than 95 %" in output
    same = write_recipe(tmp_path, max_steps=1, teacher=str(tmp_path / "model"),
                        privileged_context=None, output_dir=str(tmp_path / "same"))  # fmt: skip
    main(["distill", str(same)])
    output = capsys.readouterr().out
    assert "there is next to nothing to learn" in output
    assert "less than 95 %" not in output
    other = write_model(tmp_path / "other", seed=9)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template + " ")
    trainer = make_trainer(tmp_path / "far", teacher=str(other))
    output = capsys.readouterr().out
    assert f"chat template: {other} has a different one" in output
    assert trainer.teachers
    make_trainer(tmp_path / "saves", save_strategy="steps")
    assert re.search(r"preflight: disk: 0\.0 GiB for a checkpoint; \d+\.\d GiB are free\n",
                     capsys.readouterr().out)  # fmt: skip
    monkeypatch.setattr("psutil.disk_usage", lambda path: SimpleNamespace(free=60_000))
    make_trainer(tmp_path / "full", save_strategy="steps")
    assert "that is too little for two: make room" in capsys.readouterr().out
    make_trainer(tmp_path / "quiet", preflight=False)
    assert "preflight" not in capsys.readouterr().out
    assert load_config(RLVRConfig, _rlvr(tmp_path), []).preflight


def _rlvr(folder):
    changes = {"teacher": None, "privileged_context": None, "tail": None, "k": None}
    return write_recipe(folder, **changes, completions_per_prompt=2)


def test_the_token_that_a_server_adds_is_not_of_its_top_k():
    log_probs = torch.tensor([[0.5, 0.25, 0.1], [0.5, 0.25, -1.0]]).log().nan_to_num(-torch.inf)
    ids = torch.tensor([[1, 2, 7], [1, 2, -1]])  # the second token is one of the top two
    served = SparseLogits.from_log_probs(log_probs, ids, vocab_size=9)
    student = SparseLogits.from_log_probs(
        log_probs[:, :2], torch.tensor([[1, 7]] * 2), vocab_size=9
    )
    sums = Sums()
    sums.add_positions(student, served, torch.tensor([7, 2]), [2])
    assert sums["teacher_nll"] == pytest.approx(-math.log(0.1) - math.log(0.25))
    assert sums["outside_teacher_top_k"] == 1
    assert sums["overlap"] == 1  # one half in each row
    assert "teacher_entropy" not in sums

"""Several teachers, importance weights, reference completions and reused completions."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import reverse_kl
from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.__main__ import main
from tests.tiny_run import make_trainer, read_metrics, write_model, write_recipe
from tests.trainer_steps import assert_same_step, completions, gradient_of


def _rows(model, context, completion):
    rows = lazy_logits(model, torch.tensor([context + completion.ids]))[0]
    return rows[len(context) - 1 : -1]


def _per_token(trainer, teacher, completion):
    s = _rows(trainer.model, completion.prompt.student_ids, completion).topk(8)
    with torch.no_grad():
        t = _rows(teacher, completion.prompt.teacher_ids, completion).gather(s.ids)
    return reverse_kl(s, t, tail="bucket")


def _assert_step(trainer, expected, step):
    assert_close(step[0], expected.detach(), rtol=1e-5, atol=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert_close(step[1][name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def _routed(folder):
    """Return recipe keys for two teachers of different width; each row names its own."""
    write_model(folder / "wide", seed=3)
    write_model(folder / "other", seed=4, name="qwen3")
    rows = [{"prompt": f"say {i}", "teacher": ["wide", "other"][i % 2]} for i in range(12)]
    write_recipe(folder)
    path = folder / "routed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {name: str(folder / name) for name in ("wide", "other")}
    return {"teacher": teachers, "train_data": str(path), "eval_data": str(path)}


def test_each_row_learns_from_its_own_teacher(tmp_path):
    trainer = make_trainer(tmp_path, **_routed(tmp_path), micro_batch_size=4)
    assert {p.teacher for p in trainer.train_dataset} == {"wide", "other"}
    batch = [
        replace(c, prompt=replace(c.prompt, teacher=["wide", "other"][i % 2]))
        for i, c in enumerate(completions())
    ]
    step = gradient_of(trainer, batch)
    terms = [_per_token(trainer, trainer.teachers[c.prompt.teacher].model, c) for c in batch]
    _assert_step(trainer, torch.cat(terms).mean(), step)
    trainer.args.micro_batch_size = 1
    assert_same_step(gradient_of(trainer, batch), step)


def test_a_run_with_several_teachers(tmp_path):
    options = _routed(tmp_path)
    main(["distill", str(write_recipe(tmp_path, **options, max_steps=6, learning_rate=3e-3))])
    _, lines = read_metrics(tmp_path / "run")
    evaluations = [x for x in lines if "eval_reverse_kl" in x]
    assert evaluations[-1]["eval_reverse_kl"] < evaluations[0]["eval_reverse_kl"]
    samples = (tmp_path / "run" / "samples" / "step-0.jsonl").read_text().splitlines()
    assert [json.loads(x)["prompt"] for x in samples] == [f"say {i}" for i in range(12)]
    (tmp_path / "routed.jsonl").write_text('{"prompt": "a", "teacher": "narrow"}\n')
    recipe = write_recipe(tmp_path, **options, output_dir=str(tmp_path / "b"))
    message = "row 1, teacher: expected one of other, wide, got 'narrow'"
    with pytest.raises(SystemExit, match=message):
        main(["distill", str(recipe)])
    (tmp_path / "routed.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit, match="expected one of other, wide, got None"):
        main(["distill", str(recipe), "--output_dir", str(tmp_path / "c")])


def test_importance_weights_are_the_clipped_ratio_to_the_policy_that_sampled(tmp_path):
    trainer = make_trainer(tmp_path, max_importance_weight=1.5)
    shifts = [0.3, -0.2, 0.0, 2.0, -1.0, 0.1]
    batch, terms = [], []
    for c, shift in zip(completions(), shifts, strict=True):
        now = _rows(trainer.model, c.prompt.student_ids, c).log_prob(torch.tensor(c.ids)).detach()
        batch.append(replace(c, log_probs=(now - shift).tolist()))
        ratio = torch.tensor(shift).exp().clamp_max(1.5)
        terms.append(ratio * _per_token(trainer, trainer.teachers[""].model, c))
    step = gradient_of(trainer, batch)
    _assert_step(trainer, torch.cat(terms).mean(), step)
    fresh = trainer.complete(trainer.train_dataset[:2])
    for c in fresh:
        now = _rows(trainer.model, c.prompt.student_ids, c).log_prob(torch.tensor(c.ids))
        assert c.log_probs == pytest.approx(now.tolist(), abs=1e-4)


def test_reference_completions_are_mixed_in(tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "no" * (i % 3)} for i in range(8)]
    write_recipe(tmp_path)
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_data": str(tmp_path / "given.jsonl"), "completions_per_prompt": 2}
    trainer = make_trainer(tmp_path, sft_coef=0.25, **options)
    batch = trainer.complete(trainer.train_dataset[:3])
    assert len(batch) == 6
    step = gradient_of(trainer, batch)
    terms = [_per_token(trainer, trainer.teachers[""].model, c) for c in batch]
    likelihoods = []
    for prompt in trainer.train_dataset[:3]:
        given = replace(batch[0], prompt=prompt, ids=prompt.reference_ids)
        rows = _rows(trainer.model, prompt.student_ids, given)
        likelihoods.append(rows.log_prob(torch.tensor(given.ids)))
    _assert_step(trainer, torch.cat(terms).mean() - 0.25 * torch.cat(likelihoods).mean(), step)
    with pytest.raises(ValueError, match="sft_coef: expected a completion in every row"):
        make_trainer(tmp_path / "without", sft_coef=0.25)


def test_reused_completions_are_learned_from_in_consecutive_steps(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_rollout=3, max_steps=9, num_train_epochs=1)
    trainer.evaluation.prompts = []
    seen, learn, sampled = [], trainer.learn, []
    trainer.learn = lambda model, batch: seen.append(batch) or learn(model, batch)
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda *a, **k: sampled.append(a[1]) or sample(*a, **k)
    trainer.train()
    assert len(seen) == 9
    assert len(sampled) == 3
    for first in (0, 3, 6):
        assert seen[first] == seen[first + 1] == seen[first + 2]
    texts = [p.text for batch in sampled for p in batch]
    assert sorted(texts) == sorted(f"say {i}" for i in range(12))  # every prompt once


def test_repeated_batches_are_full_and_random(tmp_path):
    trainer = make_trainer(tmp_path, steps_per_rollout=2, per_device_train_batch_size=5)
    order = trainer.order
    first = list(order)
    assert len(first) == len(order) == 20
    assert first[:5] == first[5:10]
    assert first[10:15] == first[15:]
    assert len(set(first)) == 10
    assert list(order) == first
    trainer.state.epoch = 1.5
    assert list(order) != first
    with pytest.raises(ValueError, match=r"expected at most the 12 prompts .*, got 13"):
        make_trainer(tmp_path, steps_per_rollout=2, per_device_train_batch_size=13)

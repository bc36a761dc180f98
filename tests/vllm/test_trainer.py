"""The trainer with a real vLLM: its server as the teacher, and its engine for rollouts."""

import json

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.build import load, prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.data import Prompt
from opd_trainer.errors import TeacherError
from opd_trainer.models.load import load_tokenizer
from opd_trainer.models.rollout import Completion, Sampler
from opd_trainer.models.server import ServedTeacher
from opd_trainer.models.teacher import log_probs
from tests.tiny_run import write_recipe
from tests.vllm.server import API_KEY

QUESTIONS = ["What is a tree?", "How do I cook rice?", "Name three colours.", "Why is it dark?"]


def _recipe(folder, smollm2, **changes):
    options = {"model": str(smollm2), "scorer": None, "eval_data": None, "k": 20} | changes
    options |= {"per_device_train_batch_size": 4, "max_completion_length": 12, "preflight": False}
    write_recipe(folder)
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS)
    )
    recipe = write_recipe(folder, train_data=str(folder / "questions.jsonl"), **options)
    return load_config(DistillationConfig, recipe, [])


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}])
def test_after_a_step_the_engines_greedy_output_is_that_of_the_trained_weights(
    tmp_path, smollm2, options
):
    config = _recipe(
        tmp_path, smollm2, rollout_engine="vllm", learning_rate=2e-3 if options else 2e-4,
        max_steps=2, **options,
    )  # fmt: skip
    trainer, _ = prepare(config)
    transformers = Sampler(config, trainer.sampler.tokenizer, trainer.model)
    prompts = trainer.train_dataset

    def both():
        return [
            [c.ids for c in sampler.sample(trainer.model, prompts, 1, greedy=True)]
            for sampler in (trainer.sampler, transformers)
        ]

    before, expected = both()
    assert before == expected
    first = trainer.sampler.sample(trainer.model, prompts, 5)
    assert trainer.sampler.sample(trainer.model, prompts, 5) == first
    assert trainer.sampler.sample(trainer.model, prompts, 6) != first
    trainer.train()
    after, expected = both()
    assert after == expected
    assert after != before


def test_the_engines_log_probs_are_those_of_the_student(tmp_path, smollm2):
    """At the temperature of the samples, so that the log shows no distance."""
    changes = {"rollout_engine": "vllm", "temperature": 0.7, "max_steps": 1, "learning_rate": 1e-5}
    trainer, _ = prepare(_recipe(tmp_path, smollm2, **changes))
    samples = trainer.sampler.sample(trainer.model, trainer.train_dataset, 5)
    assert all(len(c.log_probs) == len(c.ids) for c in samples)
    with torch.no_grad():
        now = log_probs(trainer.model.eval(), samples, 0.7)
    sampled = torch.tensor([x for c in samples for x in c.log_probs])
    assert_close(sampled, now, rtol=0, atol=2e-3)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["log_prob_difference_max"] < 2e-3


def test_a_served_teachers_log_probs_are_the_local_ones(
    tmp_path, smollm2, model, server_url, monkeypatch
):
    config = _recipe(tmp_path, smollm2, teacher=server_url, support="teacher", tail=None)
    monkeypatch.setenv("OPD_TEACHER_API_KEY", API_KEY)
    tokenizer = load_tokenizer(str(smollm2))
    teacher = ServedTeacher(server_url, config, tokenizer, 49_152)
    assert teacher.limits.context == 511
    torch.manual_seed(0)
    batch = []
    for length in (1, 5, 40, 200):
        ids = torch.randint(100, 40_000, (length + 7,)).tolist()
        batch.append(Completion(Prompt("", ids[:2], ids[:length]), ids[length:], True))
    teacher.prepare(batch)
    served = teacher.logits(batch, 1.0)
    scored = []
    for c in batch:
        context = c.prompt.teacher_ids
        rows = lazy_logits(model, torch.tensor([context + c.ids]))[0, len(context) - 1 : -1]
        scored.append(rows.materialize().log_softmax(-1))
    expected = torch.cat(scored).detach()
    live = served.values > -torch.inf
    assert (live.sum(-1) >= 20).all()
    local = expected.gather(-1, served.ids.clamp_min(0))
    assert_close(served.values[live], local[live], rtol=0, atol=1e-3)
    best = expected.topk(20).values
    assert_close(served.values.topk(20).values, best, rtol=0, atol=1e-3)
    monkeypatch.setenv("OPD_TEACHER_API_KEY", "wrong")
    with pytest.raises(TeacherError, match="refused the API key"):
        ServedTeacher(server_url, config, tokenizer, 49_152)
    monkeypatch.setenv("OPD_TEACHER_API_KEY", API_KEY)
    many = _recipe(tmp_path, smollm2, teacher=server_url, support="teacher", tail=None, k=65)
    with pytest.raises(TeacherError, match=r"max allowed: 64.*--max-logprobs"):
        ServedTeacher(server_url, many, tokenizer, 49_152)


def test_a_run_with_a_served_teacher(tmp_path, smollm2, server_url, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_API_KEY", API_KEY)
    config = _recipe(tmp_path, smollm2, teacher=server_url, support="teacher", max_steps=2)
    student, evaluation, _ = load(config)
    assert isinstance(evaluation.teachers[""], ServedTeacher)
    trainer, _ = prepare(config)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 5 for loss in losses)
    assert student.num_parameters() == trainer.model.num_parameters()

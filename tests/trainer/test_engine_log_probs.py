"""The rollout engine's own log-probs: what they are, their distance from the student's, weights."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.config import DistillationConfig, RLVRConfig, load_config
from opd_trainer.models.rollout import Completion, Sampler
from opd_trainer.stages.rlvr import clipped_policy_loss
from tests.tiny_models import tiny_model
from tests.tiny_run import NO_TEACHER, make_trainer, read_metrics, tiny_tokenizer, write_recipe
from tests.trainer.test_rollout import PROMPTS
from tests.trainer_steps import completions, gradient_of

OFF = {"eval_on_start": False, "preflight": False}


def _log_probs(model, completion, temperature=1.0):
    """Return the log-probs [T, V] that predict the tokens of a completion."""
    context = completion.prompt.student_ids
    ids = torch.tensor([context + completion.ids])
    logits = lazy_logits(model, ids, temperature=temperature).materialize()[0].detach()
    return logits[len(context) - 1 : -1].log_softmax(-1)


def _of_tokens(log_probs, completion):
    return log_probs.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]


@contextmanager
def _scaled_head(model, factor=2.0):
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
        yield
        model.lm_head.weight.div_(factor)


def _break_engine(sampler):
    """Let it sample from the student with its head scaled by 2, as stale weights would."""

    def generate(self, model, *arguments):
        with _scaled_head(model):
            return Sampler._generate(self, model, *arguments)

    sampler._generate = MethodType(generate, sampler)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (0.7, 0.6)])
def test_they_are_those_of_the_distribution_that_is_sampled(tmp_path, temperature, top_p):
    """Tempered, and renormalised on the smallest set that holds top_p of the mass."""
    changes = {"temperature": temperature, "top_p": top_p, "max_completion_length": 24}
    config = load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 11, 12, 13]
    sampler = Sampler(config, tiny_tokenizer(), model)
    samples = [c for seed in range(4) for c in sampler.sample(model, PROMPTS, seed)]
    assert len({len(c.ids) for c in samples}) > 2  # some end before the others of their batch
    for c in samples:
        log_p = _log_probs(model, c, temperature)
        if top_p < 1:
            ranked = log_p.sort(-1, descending=True)
            before = ranked.values.exp().cumsum(-1) - ranked.values.exp()
            log_p = log_p.scatter(
                -1, ranked.indices, ranked.values.where(before < top_p, -torch.inf)
            )
            log_p = log_p.log_softmax(-1)
        expected = _of_tokens(log_p, c)
        assert_close(torch.tensor(c.log_probs), expected, rtol=1e-4, atol=1e-4)
    (greedy,) = sampler.sample(model, PROMPTS[:1], 1, greedy=True)
    assert greedy.log_probs is None


@pytest.mark.parametrize("support", ["student", "teacher", "full"])
@pytest.mark.parametrize("weight", [None, 3.0])
def test_an_engine_that_samples_from_other_weights_shows(tmp_path, support, weight):
    changes = {"support": support, "max_importance_weight": weight, "max_steps": 1}
    changes |= {"tail": None} if support == "full" else {}
    lines = []
    for is_broken in (False, True):
        trainer = make_trainer(tmp_path, **changes, **OFF)
        student = tiny_model("llama")
        student.load_state_dict(trainer.model.state_dict())
        if is_broken:
            _break_engine(trainer.sampler)
        trainer.train()
        ((line,), _) = read_metrics(Path(trainer.args.output_dir))
        pairs = [(_of_tokens(_log_probs(student, c), c), c) for c in trainer.rollout]
        distances = torch.cat([(x - torch.tensor(c.log_probs)).abs() for x, c in pairs])
        assert line["log_prob_difference"] == pytest.approx(float(distances.mean()), abs=1e-4)
        assert line["log_prob_difference_max"] == pytest.approx(float(distances.max()), abs=1e-4)
        lines.append(line)
    healthy, broken = lines
    assert healthy["log_prob_difference_max"] < 1e-4
    assert "Engine:" not in healthy.get("alarm", "")
    assert broken["log_prob_difference"] > 0.3
    assert "Engine: its log-probs of the samples differ from the student's by" in broken["alarm"]


def test_only_fresh_samples_of_the_same_distribution_are_compared(tmp_path):
    changes = {"steps_per_rollout": 2, "learning_rate": 0.5, "max_steps": 4, "logging_steps": 4}
    trainer = make_trainer(tmp_path, **changes, max_importance_weight=9.0, **OFF)
    trainer.train()
    ((line,), _) = read_metrics(Path(trainer.args.output_dir))
    assert line["log_prob_difference_max"] < 1e-3
    trainer = make_trainer(tmp_path, sampling_temperature=0.5, max_steps=1, **OFF)
    trainer.train()
    ((line,), _) = read_metrics(Path(trainer.args.output_dir))
    assert "log_prob_difference" not in line


def test_the_weights_correct_the_gradient_of_another_engine(tmp_path):
    """The mean over what the engine may sample is the gradient of the student's reverse KL."""
    changes = {"objective": "policy_gradient", "tail": None, "max_importance_weight": 1e6}
    trainer = make_trainer(tmp_path, **changes, **OFF)
    model, prompt = trainer.model, trainer.train_dataset[0]
    first = Completion(prompt, [5], truncated=True)
    with _scaled_head(model):
        log_q = _log_probs(model, first)[0]
    parameter = model.model.layers[0].mlp.up_proj.weight
    uncorrected, corrected = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for token in range(97):
        sample = replace(first, ids=[token], log_probs=[float(log_q[token])])
        corrected += log_q[token].exp() * gradient_of(trainer, [sample])[1][_name(model, parameter)]
        sample = replace(sample, log_probs=None)
        uncorrected += (
            log_q[token].exp() * gradient_of(trainer, [sample])[1][_name(model, parameter)]
        )
    model.zero_grad()
    ids = torch.tensor([prompt.student_ids])
    log_p = lazy_logits(model, ids).materialize()[0, -1].log_softmax(-1)
    with torch.no_grad(), trainer.teachers[""].active() as teacher:
        seen = lazy_logits(teacher, torch.tensor([prompt.teacher_ids])).materialize()[0, -1]
    (log_p.exp() * (log_p - seen.log_softmax(-1))).sum().backward()
    scale = float(parameter.grad.abs().max())
    assert_close(corrected, parameter.grad, rtol=1e-3, atol=1e-4 * scale)
    assert (uncorrected - parameter.grad).abs().max() > 0.1 * scale


def _name(model, parameter):
    return next(n for n, p in model.named_parameters() if p is parameter)


def test_rlvr_clips_the_ratio_to_the_engine(tmp_path):
    changes = NO_TEACHER | {"completions_per_prompt": 2, "per_device_train_batch_size": 3}
    trainer = make_trainer(tmp_path, RLVRConfig, **changes, **OFF)
    batch, terms = [], []
    for c, shift, advantage in zip(
        completions(),
        [0.1, 0.5, -0.1, -0.5, 0.0, 1.0],
        [1.0, 1.0, -1.0, -1.0, 2.0, -2.0],
        strict=True,
    ):
        now = _of_tokens(_log_probs(trainer.model, c), c)
        batch.append(replace(c, log_probs=(now - shift).tolist(), advantage=advantage))
        advantages = torch.full_like(now, advantage)
        terms.append(clipped_policy_loss(now, now - shift, advantages, 0.2, None)[0])
    loss, _, sums = gradient_of(trainer, batch)
    assert_close(loss, torch.cat(terms).mean(), rtol=1e-5, atol=1e-6)
    assert sums["log_prob_difference_max"] == pytest.approx(1, rel=1e-4)

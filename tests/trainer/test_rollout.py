"""Rollouts, and batches of completions."""

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits, pad_completions
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.data import Prompt
from opd_trainer.models.rollout import Sampler
from tests.tiny_models import tiny_model
from tests.tiny_run import tiny_tokenizer, write_recipe

PROMPTS = [
    Prompt("", [5, 6, 7, 8], [9, 5, 6]),
    Prompt("", [9], [4, 4, 4, 9]),
    Prompt("", [2, 2], [7]),
]


@pytest.fixture
def sampler(tmp_path):
    """Return a sampler and its model, whose own generation config must not change the samples."""
    config = load_config(DistillationConfig, write_recipe(tmp_path, max_completion_length=24), [])
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 11, 12, 13]
    sampler = Sampler(config, tiny_tokenizer(), model)
    return sampler, model


def test_samples_repeat_by_seed_whatever_ran_before(sampler):
    sampler, model = sampler
    first = sampler.sample(model, PROMPTS, 3, 1)
    torch.rand(100)
    state = torch.get_rng_state()
    assert sampler.sample(model, PROMPTS, 3, 1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler.sample(model, PROMPTS, 3, 2) != first
    assert sampler.sample(model, PROMPTS, 3, 1, as_teacher=True) != first


def test_completions_end_at_the_first_eos(sampler):
    sampler, model = sampler
    assert sampler.eos_ids == {2, 11, 12, 13}
    completions = [c for seed in range(20) for c in sampler.sample(model, PROMPTS, seed)]
    assert any(c.truncated for c in completions)
    assert not all(c.truncated for c in completions)
    for completion in completions:
        *body, last = completion.ids
        assert not set(body) & sampler.eos_ids
        assert completion.truncated == (last not in sampler.eos_ids)
        assert not completion.truncated or len(completion.ids) == 24


def test_student_and_teacher_sample_their_common_ids_and_end_at_any_eos_of_either(tmp_path):
    config = load_config(DistillationConfig, write_recipe(tmp_path, max_completion_length=24), [])
    student, teacher = tiny_model("llama"), tiny_model("llama", vocab_size=103, seed=1)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = 11, [12, 13]
    sampler = Sampler(config, tiny_tokenizer(), student, teacher)
    assert sampler.eos_ids == {2, 11, 12, 13}
    with torch.no_grad():  # large logits: these ids would be sampled nearly always
        teacher.lm_head.weight[97:] = 9 * teacher.lm_head.weight[:6]
    bare = Sampler(config, tiny_tokenizer(), teacher)
    for seed in range(8):
        ids = [t for c in sampler.sample(teacher, PROMPTS, seed, as_teacher=True) for t in c.ids]
        assert max(ids) < 97
    ids = [t for seed in range(8) for c in bare.sample(teacher, PROMPTS, seed) for t in c.ids]
    assert max(ids) >= 97


def test_eos_counts_once_though_it_is_also_padding(sampler):
    sampler, _ = sampler
    completion = sampler.cut_after_eos(PROMPTS[0], [7, 8, 2, 2, 2, 2])
    assert (completion.ids, completion.truncated) == ([7, 8, 2], False)
    assert sampler.cut_after_eos(PROMPTS[0], [2, 2, 2]).ids == [2]
    assert sampler.cut_after_eos(PROMPTS[0], [7, 7, 7]).truncated


def test_the_models_own_generation_options_do_not_bend_the_samples(sampler):
    sampler, model = sampler
    expected = sampler.sample(model, PROMPTS, 1)
    options = model.generation_config
    options.repetition_penalty, options.top_k, options.suppress_tokens = 9.0, 1, [5, 6, 7]
    assert sampler.sample(model, PROMPTS, 1) == expected
    assert model.generation_config is options
    model.train()
    sampler.sample(model, PROMPTS, 1)
    assert model.training


def test_samples_follow_the_tempered_distribution(sampler):
    """Chi-square of the first token over many samples against softmax(z / temperature)."""
    sampler, model = sampler
    sampler.options.temperature, sampler.options.max_new_tokens = 0.5, 1
    count = 4000
    ids = [c.ids[0] for c in sampler.sample(model, [PROMPTS[0]] * count, 0)]
    tokens = torch.tensor([PROMPTS[0].student_ids])
    p = lazy_logits(model, tokens, temperature=0.5).materialize()[0, -1].softmax(-1).detach()
    observed = torch.bincount(torch.tensor(ids), minlength=97)
    likely = p > 5 / count
    chi_square = ((observed - count * p).square() / (count * p))[likely].sum()
    freedom = int(likely.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    untempered = lazy_logits(model, tokens).materialize()[0, -1].softmax(-1).detach()
    wrong = ((observed - count * untempered).square() / (count * untempered))[likely].sum()
    assert wrong > 10 * chi_square


def test_pad_completions_marks_what_is_predicted():
    ids, mask, predicts = pad_completions([[5, 6, 7], [8]], [[2], [4, 2, 9]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 2], [8, 4, 2, 9]]
    assert predicts.tolist() == [[False, False, True, False], [True, True, True, False]]
    ids, mask, predicts = pad_completions([[5, 6], [8]], [[2], [4]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 2], [8, 4, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert predicts.tolist() == [[False, True, False], [True, False, False]]


def test_predicted_rows_hold_the_log_probs_of_the_completions():
    model = tiny_model("llama")
    prompts, completions = [[5, 6, 7], [8], [3, 3]], [[2], [4, 2, 9], [6, 6]]
    ids, mask, predicts = pad_completions(prompts, completions, torch.device("cpu"))
    rows = lazy_logits(model, ids, mask)[predicts]
    actual = rows.log_prob(torch.tensor([token for ids in completions for token in ids]))
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected += [log_p[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]
    assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)

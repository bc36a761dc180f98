"""Mixtures of experts: the auxiliary loss of their router is part of a step, not of a rollout."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import call_with_lazy_logits
from opd_trainer.config import DistillationConfig, RLVRConfig, SFTConfig
from opd_trainer.models.load import load_model
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_run import NO_TEACHER, make_trainer, read_metrics, write_model, write_recipe
from tests.trainer_steps import assert_same_gradients, completions, gradient_of

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "jetmoe"]
COEFFICIENT = 0.5


def _options(name):
    key = "aux_loss_coef" if name == "jetmoe" else "router_aux_loss_coef"
    return {"output_router_logits": True, key: COEFFICIENT}


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_router_loss_is_that_of_the_models_own_loss(name):
    torch.manual_seed(0)
    model = tiny_model(name, **_options(name)).train()
    ids, mask = tiny_batch()
    labels = ids.masked_fill(mask == 0, -100)
    own = model(ids, attention_mask=mask, labels=labels)
    assert own.aux_loss > 0.1
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]

    def loss(logits, router_loss):
        assert_close(router_loss, COEFFICIENT * own.aux_loss)
        log_probs = logits.log_prob(shifted, ignore_index=-100)
        return router_loss - log_probs.sum() / (shifted != -100).sum()

    expected = _gradients(model, own.loss)
    actual = call_with_lazy_logits(model, loss, ids, mask, with_router_loss=True)
    assert_close(actual, own.loss)
    assert_same_gradients(_gradients(model, actual), expected)
    dense = tiny_model("llama")
    assert call_with_lazy_logits(dense, lambda _, x: x, ids, mask, with_router_loss=True) == 0


def _prepare(folder, name, stage, **changes):
    write_recipe(folder)
    shutil.rmtree(folder / "model")
    write_model(folder / "model", name=name, **_options(name))
    return make_trainer(folder, stage, preflight=False, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_sft_minimises_the_models_own_loss(tmp_path, name):
    (tmp_path / "given.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    changes = {"train_data": str(tmp_path / "given.jsonl"), "micro_batch_size": 10}
    trainer = _prepare(tmp_path, name, SFTConfig, **NO_TEACHER | changes)
    batch = completions()
    loss, gradients, _ = gradient_of(trainer, batch)
    rows = sorted(batch, key=lambda c: -len(c.prompt.student_ids + c.ids))
    ids = [torch.tensor(c.prompt.student_ids + c.ids) for c in rows]
    labels = [x.clone() for x in ids]
    for c, row in zip(rows, labels, strict=True):
        row[: len(c.prompt.student_ids)] = -100
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(x) for x in ids], batch_first=True)
    labels = pad(labels, batch_first=True, padding_value=-100)
    own = trainer.model(pad(ids, batch_first=True), attention_mask=mask, labels=labels)
    assert_close(loss, own.loss.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, _gradients(trainer.model, own.loss))


def test_micro_batches_weigh_their_router_losses_by_their_tokens(tmp_path):
    trainer = _prepare(tmp_path, "mixtral", DistillationConfig, micro_batch_size=2)
    batch, model = completions(), trainer.model

    def loss(adds_router_loss):
        model.config.output_router_logits = adds_router_loss
        return float(gradient_of(trainer, batch)[0])

    router = loss(True) - loss(False)
    model.config.output_router_logits = True
    rows = sorted(batch, key=lambda c: -c.context_length)
    expected, tokens = 0.0, sum(len(c.ids) for c in batch)
    for pair in (rows[:2], rows[2:4], rows[4:]):
        ids = [torch.tensor(c.prompt.student_ids + c.ids) for c in pair]
        mask = [torch.ones_like(x) for x in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        with torch.no_grad():
            out = model(pad(ids, batch_first=True), attention_mask=pad(mask, batch_first=True))
        share = sum(len(c.ids) for c in pair) / tokens
        expected += share * COEFFICIENT * float(out.aux_loss)
    assert router == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", [DistillationConfig, RLVRConfig])
def test_rollouts_with_padding_run_without_the_router_loss(tmp_path, stage):
    """Prompts of different lengths are padded, and a KV cache has other shapes than the mask."""
    changes = {"max_steps": 2} | ({} if stage is DistillationConfig else NO_TEACHER)
    if stage is RLVRConfig:
        changes |= {"completions_per_prompt": 2}
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "{"x" * n}"}}\n' for n in (1, 5, 9, 2))
    )
    changes |= {"train_data": str(tmp_path / "prompts.jsonl")}
    trainer = _prepare(tmp_path, "mixtral", stage, **changes)
    trainer.train()
    assert len(read_metrics(Path(trainer.args.output_dir))[0]) == 2
    assert trainer.model.config.output_router_logits
    assert load_model(str(trainer.save_student()), "float32").config.output_router_logits

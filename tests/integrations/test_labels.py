"""A patched model computes the same loss of labels as before, without logits."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from opd_kernels.integrations.labels import patch
from opd_kernels.integrations.transformers import lazy_logits
from tests.tiny_models import CONFIGS, tiny_batch, tiny_model

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}


@pytest.mark.parametrize("name", [*CONFIGS, "mixtral"])
@pytest.mark.parametrize("items", [None, 50])
def test_a_patched_models_loss_is_its_own_without_logits(name, items):
    model = tiny_model(name, **MOE if name == "mixtral" else {})
    ids, mask = tiny_batch()
    labels = ids.masked_fill(mask == 0, -100)
    given = {"labels": labels, "attention_mask": mask, "num_items_in_batch": items}

    def step(output):
        model.zero_grad()
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output.loss.detach(), gradients

    expected = step(model(ids, **given))
    before = model(ids, attention_mask=mask).logits
    assert patch(model) is model
    output = model(ids, **given)
    assert output.logits is None
    assert "logits" not in output
    assert output[0] is output.loss
    loss, gradients = step(output)
    assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected[1].keys()
    for parameter, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5 * scale)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert_close(lazy_logits(model, ids, mask).materialize(), before, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_patched_model_has_weights_of_its_own():
    model, (ids, _) = patch(tiny_model("llama")), tiny_batch()
    before = model(ids, labels=ids).loss
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert_close(model(ids, labels=ids).loss, before)
    expected = tiny_model("llama")
    with torch.no_grad():
        expected.lm_head.weight.mul_(2)
    assert_close(other(ids, labels=ids).loss, expected(ids, labels=ids).loss)
    assert_close(other(ids).logits, expected(ids).logits)


def test_a_class_with_another_loss_of_labels_is_not_patched():
    bart = AutoModelForCausalLM.from_config(
        BartConfig(vocab_size=97, d_model=16, decoder_layers=1, decoder_attention_heads=2,
                   decoder_ffn_dim=32, is_decoder=True)
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="BartForCausalLM does not compute it with transformers' ForCausal"
    ):
        patch(bart)
    with pytest.raises(ValueError, match="already has another forward on this instance"):
        patch(patch(tiny_model("llama")))


def test_a_patched_model_trains_in_transformers_trainer(tmp_path):
    rows = [{"input_ids": x.tolist(), "labels": x.tolist()} for x in torch.randint(3, 97, (8, 12))]
    options = {"output_dir": str(tmp_path), "max_steps": 3, "use_cpu": True, "report_to": "none",
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
               "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    losses = []
    for change in (lambda model: model, patch):
        trainer = Trainer(change(tiny_model("llama")), TrainingArguments(**options),
                          train_dataset=rows, data_collator=default_data_collator)  # fmt: skip
        trainer.train()
        losses.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

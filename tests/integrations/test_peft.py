"""lazy_logits of models with adapters equal the model's logits, whatever PEFT method is active."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from tests.tiny_models import tiny_batch, tiny_model

LAYERS = {"target_modules": ["q_proj", "lm_head"]}
VIRTUAL = {"num_virtual_tokens": 3}
METHODS = {
    "lora": LoraConfig(r=4, **LAYERS),
    "rslora": LoraConfig(r=4, use_rslora=True, **LAYERS),
    "dora": LoraConfig(r=4, use_dora=True, **LAYERS),
    "lora with a bias": LoraConfig(r=4, lora_bias=True, **LAYERS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **LAYERS),
    "loha": peft.LoHaConfig(r=4, **LAYERS),
    "lokr": peft.LoKrConfig(r=4, **LAYERS),
    "ia3": peft.IA3Config(feedforward_modules=["lm_head"], **LAYERS),
    "vera": peft.VeraConfig(r=4, **LAYERS),
    "oft": peft.OFTConfig(oft_block_size=4, **LAYERS),
    "hra": peft.HRAConfig(r=4, **LAYERS),
    "randlora": peft.RandLoraConfig(r=4, **LAYERS),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **LAYERS),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "a copy of the head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens of the embedding": LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5, 9]}
    ),
    "prompt tuning": peft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL),
    "prefix tuning": peft.PrefixTuningConfig(**VIRTUAL),
}


def adapted(config, **changes):
    """A tiny model with an adapter that changes its logits, as a new one does not."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_model("llama", **changes), config)
    return disturb(model)


def disturb(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_same(model, ids, mask):
    """Logits and all gradients, in the mode of the model."""
    expected = model(input_ids=ids, attention_mask=mask).logits
    logits = lazy_logits(model, ids, mask)
    actual = logits.materialize()
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    targets = torch.randint(0, 97, expected.shape[:2])
    eager = expected.log_softmax(-1).gather(-1, targets[..., None]).sum()
    losses = eager, logits.log_prob(targets).sum()
    eager, lazy = (
        torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True)
        for x in losses
    )
    for e, a in zip(eager, lazy, strict=True):
        assert_close(a, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_active_and_disabled(method, tied):
    changes = {"tie_word_embeddings": True} if tied else {}
    model, (ids, mask) = adapted(METHODS[method], **changes).eval(), tiny_batch()
    assert_same(model, ids, mask)
    base = tiny_model("llama", **changes)(ids, attention_mask=mask).logits
    with model.disable_adapter(), torch.no_grad():
        seen = []
        call_with_lazy_logits(model, seen.append, ids, mask)
        assert_close(seen[0].materialize(), base, rtol=1e-4, atol=1e-4)
    assert_same(model.train(), ids, mask)


@pytest.mark.parametrize("first", ["lora", "a copy of the head", "dora"])
def test_an_adapter_of_the_head_while_another_is_active(first):
    model, (ids, mask) = adapted(METHODS[first]).eval(), tiny_batch()
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    for active in ("other", "default"):
        model.set_adapter(active)
        disturb(model)
        assert_same(model, ids, mask)


def test_several_adapters_of_the_head_are_active():
    model, (ids, mask) = adapted(METHODS["lora"]).eval(), tiny_batch()
    model.add_adapter("second", LoraConfig(r=2, **LAYERS))
    model.base_model.set_adapter(["default", "second"])
    assert_same(disturb(model), ids, mask)
    model.merge_adapter()
    merged = model(ids, attention_mask=mask).logits
    assert_close(lazy_logits(model, ids, mask).materialize(), merged, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():  # PEFT unmerges the weight in the next forward pass
        actual = lazy_logits(model, ids, mask).materialize()
    base = tiny_model("llama")(ids, attention_mask=mask).logits
    assert_close(actual, base, rtol=1e-3, atol=1e-3)


def test_mixed_methods():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    mixed = get_peft_model(model, peft.LoHaConfig(r=4, **LAYERS), mixed=True)
    mixed.add_adapter("second", LoraConfig(r=2, **LAYERS))
    mixed.set_adapter(["default", "second"])
    assert_same(disturb(mixed).eval(), ids, mask)


def test_an_adapter_that_transformers_adds():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    model.add_adapter(LoraConfig(r=4, **LAYERS))
    assert_same(disturb(model), ids, mask)


def test_a_batch_of_several_adapters():
    """Rows may have different adapters in the decoder, but not in the head."""
    ids, mask = tiny_batch()
    names = {"adapter_names": ["default", "__base__", "other"]}
    model = adapted(LoraConfig(target_modules=["q_proj"])).eval()
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    expected = model(ids, attention_mask=mask, **names).logits
    actual = lazy_logits(model, ids, mask, **names).materialize()
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    model = adapted(METHODS["lora"]).eval()
    with pytest.raises(
        ValueError,
        match=r"adapter_names: expected one head for all rows, got a model whose adapters change "
        r"the head; call model.set_adapter\(name\)",
    ):
        lazy_logits(model, ids, mask, adapter_names=["default"] * 3)


def test_adapters_that_are_no_affine_map_are_refused():
    model = adapted(METHODS["hra"])
    forward = type(model.base_model.model.lm_head).forward
    model.base_model.model.lm_head.forward = lambda x: forward(
        model.base_model.model.lm_head, x
    ).square()
    with pytest.raises(
        ValueError, match=r"to be an affine map of its input, got peft.tuners.hra.layer.HRALinear,"
    ):
        lazy_logits(model, *tiny_batch())

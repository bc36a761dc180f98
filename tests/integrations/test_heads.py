"""Conventions of models and heads beyond those of Llama: each works, or names a remedy."""

import accelerate
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
)

from opd_kernels.integrations.transformers import lazy_logits
from tests.tiny_models import tiny_batch, tiny_model
from tests.walks.causal_lms import shrink


def logits_of(model, ids, mask, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


OTHERS = {  # keys of other parts than the text model that `shrink` does not get right
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 2, "patch_sizes": [16, 6], "hidden_sizes": [8, 16],
                         "depths": [1, 1], "out_hidden_size": 32},
        "out_hidden_size": 128,
        "projector_hidden_size": 32,
    },
}  # fmt: skip


def conditional_model(model_type, **changes):
    """A tiny model of images and text; the changes are those of its text model."""
    config = AutoConfig.for_model(model_type)
    text = config.get_text_config()
    layers = {"layer_types": text.layer_types[:2]} if hasattr(text, "layer_types") else {}
    tiny = shrink(config) | OTHERS.get(model_type, {})
    inner = next(name for name in tiny if getattr(config, name, None) is text)
    tiny[inner] |= layers | changes
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(type(config)(**tiny)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", ["muse_glimmer", "muse_spark"])
@pytest.mark.parametrize(
    ("scale", "softcap"), [(0.25, 1.5), (3.0, 20.0), (0.19611613513818404, 30.0)]
)
def test_a_scale_and_a_softcap_together(model_type, scale, softcap):
    options = {"output_multiplier": scale, "final_logit_softcapping": softcap}
    model, (ids, mask) = conditional_model(model_type, **options), tiny_batch()
    logits = lazy_logits(model, ids, mask)
    assert (logits.scale, logits.softcap) == (pytest.approx(scale, rel=5e-7), softcap)
    expected = logits_of(model, ids, mask)
    assert expected.std() > 0.05
    assert_close(logits.materialize(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma", "llava", "qwen3_vl"])
def test_models_of_images_and_text(model_type):
    model, (ids, mask) = conditional_model(model_type), tiny_batch()
    expected = logits_of(model, ids, mask)
    assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_text"])
def test_a_model_that_cuts_the_padding_of_its_vocabulary(model_type):
    config = AutoConfig.for_model(model_type)
    changes = shrink(config) | {"layer_types": config.layer_types[:2], "unpadded_vocab_size": 90}
    torch.manual_seed(0)
    model, (ids, mask) = AutoModelForCausalLM.from_config(type(config)(**changes)), tiny_batch()
    ids = ids.clamp_max(89)
    expected = logits_of(model.eval(), ids, mask)
    logits = lazy_logits(model, ids, mask)
    assert logits.shape == expected.shape == (*ids.shape, 90)
    assert_close(logits.materialize(), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_logits_is_refused():
    config = BartConfig(vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1,
                        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                        decoder_ffn_dim=32)  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"model: expected BartForConditionalGeneration to only scale or softcap its logits, "
        r"got an error for probe values \(.*\); build LazyLogits from its hidden states yourself",
    ):
        lazy_logits(BartForConditionalGeneration(config), *tiny_batch())


def test_hooks_of_others_on_the_head_get_a_row():
    """transformers' debugger takes the minimum of each module's input, which fails for no rows."""
    model, (ids, mask) = tiny_model("llama").eval(), tiny_batch()
    expected = logits_of(model, ids, mask)
    seen = []

    def look(module, args, output):
        seen.append(f"{args[0].min():8.2e} {output.abs().max():8.2e}")

    model.get_output_embeddings().register_forward_hook(look)
    assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-5, atol=1e-5)
    assert seen == [f"{seen[0].split()[0]:>8} {2.0**20:8.2e}"]


def test_a_cache_is_used():
    model, (ids, mask) = tiny_model("llama").eval(), tiny_batch()
    expected = logits_of(model, ids, mask)
    for use_cache in (False, True):
        actual = lazy_logits(model, ids, mask, use_cache=use_cache).materialize()
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    cache = DynamicCache(config=model.config)
    logits_of(model, ids[:1, :4], mask[:1, :4], past_key_values=cache, use_cache=True)
    rest = lazy_logits(model, ids[:1, 4:], mask[:1], past_key_values=cache, use_cache=True)
    assert_close(rest.materialize(), expected[:1, 4:], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]


def test_arguments_of_the_model():
    model, (ids, mask) = tiny_model("llama").eval(), tiny_batch()
    last = lazy_logits(model, ids, mask, logits_to_keep=3, return_dict=True)
    expected = logits_of(model, ids, mask)[:, -3:]
    assert_close(last.materialize(), expected, rtol=1e-5, atol=1e-5)
    for name in ("labels", "shift_labels"):
        with pytest.raises(
            TypeError,
            match=rf"{name}: expected none, since the model would compute its loss from full "
            r"logits, got torch.int64; use lazy_logits\(...\).log_prob, or patch\(model\)",
        ):
            lazy_logits(model, ids, mask, **{name: ids})
    with pytest.raises(ValueError, match="return_dict: expected True, got False"):
        lazy_logits(model, ids, mask, return_dict=False)


def offload_all(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def never_load(model, folder):
    model.to("meta")


@pytest.mark.parametrize("offload", [offload_all, offload_to_disk, never_load])
def test_a_head_without_data_is_refused(offload, tmp_path):
    model = tiny_model("llama").eval()
    offload(model, tmp_path / "offloaded")
    with pytest.raises(
        ValueError,
        match="model: the head's weight is offloaded or was never loaded: expected it in memory, "
        "got a tensor on the meta device; keep the head on a device, for example with device_map=",
    ):
        lazy_logits(model, *tiny_batch())


def offload_decoder(model, folder):
    accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))


def map_devices(model, folder):
    accelerate.dispatch_model(
        model, {"model": "disk", "lm_head": "cpu"}, main_device="cpu", offload_dir=folder
    )


@pytest.mark.parametrize("offload", [offload_decoder, map_devices])
def test_a_decoder_that_is_offloaded_works(offload, tmp_path):
    model, (ids, mask) = tiny_model("llama").eval(), tiny_batch()
    expected = logits_of(model, ids, mask)
    offload(model, str(tmp_path / "offloaded"))
    for _ in range(2):
        with torch.no_grad():
            actual = lazy_logits(model, ids, mask).materialize()
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_head_is_named_in_full():
    """Its class is named Linear too."""
    model = tiny_model("llama")
    model.lm_head = nn.Module()
    model.lm_head.__class__ = type("Linear", (nn.Module,), {"__module__": "package.quantised"})
    with pytest.raises(
        ValueError,
        match=r"expected the head to be an nn.Linear, got package.quantised.Linear; dequantise it, "
        r"for example by excluding lm_head from quantisation",
    ):
        lazy_logits(model, *tiny_batch())

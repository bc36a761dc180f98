"""lazy_logits of real architectures equal the model's logits, or the model is refused."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from opd_kernels import distillation_loss
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from tests.tiny_models import CONFIGS, tiny_batch, tiny_model
from tests.walks.causal_lms import walk


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_materialize_equals_the_models_logits(name, dtype):
    model, (ids, mask) = tiny_model(name, dtype), tiny_batch()
    expected = model(ids, attention_mask=mask).logits
    logits = lazy_logits(model, ids, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    assert_close(logits.materialize(), expected, rtol=tolerance, atol=tolerance)
    assert expected.std() > 0.02
    tempered = lazy_logits(model, ids, mask, temperature=0.5, vocab_size=90)
    assert_close(tempered.materialize(), 2 * expected[..., :90], rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gemma2", (1.0, 1.5)), ("granite", (1 / 13, None)), ("cohere", (0.0625, None))],
)
def test_head_options_are_found(name, options):
    logits = lazy_logits(tiny_model(name), *tiny_batch())
    assert (logits.scale, logits.softcap) == (pytest.approx(options[0], rel=1e-7), options[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_full_logits(name):
    """Gradients of the decoder, the head and a tied embedding, in float64."""
    model, (ids, mask) = tiny_model(name, torch.float64), tiny_batch()
    targets = torch.randint(0, 97, ids.shape)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    log_prob = model(ids, attention_mask=mask).logits.log_softmax(-1)
    expected = gradients(-(log_prob.gather(-1, targets[..., None])[..., 0] * mask).sum())
    actual = gradients(-(lazy_logits(model, ids, mask).log_prob(targets) * mask).sum())
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(
            actual[parameter], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max())
        )


def test_the_model_is_left_as_it_was():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    before = model(ids, attention_mask=mask).logits
    lazy_logits(model, ids, mask)
    with pytest.raises(RuntimeError, match="from the loss"):
        call_with_lazy_logits(model, _raise, ids, mask)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def _raise(logits):
    raise RuntimeError("from the loss")


def test_the_loss_runs_inside_the_models_forward():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    inside = []
    model.register_forward_pre_hook(lambda *_: inside.append("enter"))
    model.register_forward_hook(lambda *_: inside.append("leave"))

    def loss(logits):
        inside.append("loss")
        return logits.log_prob(ids).sum()

    total = call_with_lazy_logits(model, loss, ids, mask)
    assert inside == ["enter", "loss", "leave"]
    expected = (
        model(ids, attention_mask=mask).logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
    )
    assert_close(total, expected)


def with_lora(targets, **options):
    model = tiny_model("llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return peft


@pytest.mark.parametrize(
    ("targets", "options"),
    [(["q_proj"], {}), (["q_proj", "lm_head"], {}), (["q_proj"], {"modules_to_save": ["lm_head"]})],
)
def test_peft_heads(targets, options):
    model, (ids, mask) = with_lora(targets, **options), tiny_batch()
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    targets = torch.randint(0, 97, ids.shape)
    expected = model(ids, attention_mask=mask).logits
    assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-4, atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    eager = expected.log_softmax(-1).gather(-1, targets[..., None]).sum()
    expected = torch.autograd.grad(eager, trained)
    actual = torch.autograd.grad(lazy_logits(model, ids, mask).log_prob(targets).sum(), trained)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))
    with model.disable_adapter():
        expected = model(ids, attention_mask=mask).logits
        assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-4, atol=1e-4)


class _Int8Linear(nn.Linear):
    def forward(self, hidden):
        return hidden @ self.weight.round().T


class _OddModel(type(tiny_model("llama"))):
    """A model that changes its logits by something other than a scale or softcap."""

    change = staticmethod(lambda model, logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(self, output.logits)
        return output


def odd_model(change):
    model = tiny_model("llama")
    model.__class__ = _OddModel
    model.change = change
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model, logits: logits + 1.0,
            "expected _OddModel to only scale or softcap its logits",
        ),
        (lambda model, logits: logits.relu(), "build LazyLogits from its hidden states yourself"),
        (
            lambda model, logits: logits * torch.arange(1, 10)[:, None],
            "expected _OddModel to treat the logits of all tokens alike",
        ),
        (lambda model, logits: model.lm_head(torch.zeros(1, 1, 16)), "got 2 calls"),
        (lambda model, logits: torch.zeros(1, 1, 97), "without calling its output embeddings"),
    ],
)
def test_models_that_change_their_logits_otherwise_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lazy_logits(odd_model(lambda model, logits: change(model, logits)), *tiny_batch())


def _quantised(model):
    model.lm_head.__class__ = _Int8Linear


def _offloaded(model):
    model.lm_head.to("meta")


def _no_head(model):
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("break_head", "message"),
    [
        (_quantised, "expected the head to be an nn.Linear, got _Int8Linear; dequantise it"),
        (_offloaded, "the head's weight is offloaded"),
        (_no_head, "LlamaForCausalLM has no output embeddings"),
    ],
)
def test_heads_that_are_no_plain_weight_are_refused(break_head, message):
    model = tiny_model("llama")
    break_head(model)
    with pytest.raises(ValueError, match=message):
        lazy_logits(model, *tiny_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "has Dropout before it"),
        ({"lora_dropout": 0.1, "use_dora": True}, "has Dropout before it"),
    ],
)
def test_lora_that_cannot_be_merged_is_refused(options, message):
    model = with_lora(["lm_head"], **options)
    model.train()
    with pytest.raises(ValueError, match=message):
        lazy_logits(model, *tiny_batch())


def test_other_modules_are_refused():
    message = r"expected a causal language model .*got Linear; compile its decoder"
    with pytest.raises(TypeError, match=message):
        lazy_logits(nn.Linear(2, 2), *tiny_batch())
    with pytest.raises(TypeError, match=r"got OptimizedModule; compile its decoder"):
        lazy_logits(torch.compile(tiny_model("llama"), backend="eager"), *tiny_batch())


def test_a_compiled_decoder_works():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected = model(ids, attention_mask=mask).logits
    model.model = torch.compile(model.model, backend="eager")
    assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_compiled_in_place_runs_as_it_is():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    expected = model(ids, attention_mask=mask).logits
    model.compile(backend="eager")
    for _ in range(2):
        assert_close(lazy_logits(model, ids, mask).materialize(), expected, rtol=1e-5, atol=1e-5)
    assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)


def test_autocast_reaches_the_loss():
    model, (ids, mask) = tiny_model("llama"), tiny_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtype = call_with_lazy_logits(model, lambda x: x.flat().head.weight.dtype, ids, mask)
        expected = model(ids, attention_mask=mask).logits.float()
        actual = lazy_logits(model, ids, mask).materialize()
    assert dtype == torch.bfloat16
    assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_distilling_a_model_into_another():
    """One optimiser step lowers the loss."""
    student, teacher = tiny_model("llama", seed=1), tiny_model("qwen3", seed=2)
    ids, mask = tiny_batch()
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            target = lazy_logits(teacher, ids, mask)
        out = distillation_loss(
            lazy_logits(student, ids, mask), target, support="full", token_weights=mask
        )
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("model_type", "verdict"),
    [("olmo2", "works"), ("mamba", "works"), ("bart", "works"), ("deepseek_v3", "works"),
     ("prophetnet", "refused")],
)  # fmt: skip
def test_the_walk_over_all_classes_tells_what_works(model_type, verdict):
    """`make causal-lms` tries all classes. ProphetNet uses only some rows of its head."""
    assert walk(model_type)[0] == verdict


def test_the_walk_would_tell_a_difference(monkeypatch):
    monkeypatch.setattr(
        "tests.walks.causal_lms.lazy_logits",
        lambda model, ids: replace(lazy_logits(model, ids), scale=1.01),
    )
    assert walk("olmo2")[0] == "differs"

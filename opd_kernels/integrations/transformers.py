"""LazyLogits of any Hugging Face causal language model, with the model's own head options.

The call goes through the outermost module, so that DDP and FSDP see the forward pass: calling the
decoder below them would leave gradients unsynchronised, silently. Inside, the head's forward is
replaced for one call by one that keeps its input and weight and returns a few probe numbers in
place of logits. What the model makes of the probes shows its scale and softcap, for every
architecture alike; a model that does anything else to its logits is refused.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_kernels.checks import check_token_ids, got
from opd_kernels.integrations._heads import weight_and_bias
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.parallel import plain

T = TypeVar("T")

# Powers of two, so that a scale shows exactly; the last is large enough to saturate any softcap.
_PROBES = (0.5, -0.5, 2.0, -2.0, 16.0, -16.0, 2.0**20)


def lazy_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    **model_kwargs: Any,
) -> LazyLogits:
    """LazyLogits whose materialize() equals model(input_ids, attention_mask).logits / temperature.

    The loss is computed by the caller, after the forward pass. Under FSDP, where the weight is
    whole only during the forward pass, use call_with_lazy_logits.

    Args:
        model: a causal language model of transformers, bare or wrapped in DDP or PEFT. Its decoder
            may be compiled (model.model); torch.compile of the whole is refused.
        input_ids: [B, T] token ids.
        attention_mask: [B, T] 1 for tokens, 0 for padding.
        temperature: as LazyLogits'.
        vocab_size: as LazyLogits'; default all rows of the head.
        **model_kwargs: passed to the model, for example position_ids.

    Returns:
        LazyLogits with hidden [B, T, D]; gradients flow into the decoder, the head and any LoRA on
        it.

    Raises:
        TypeError: model is not a causal language model of transformers, or input_ids and
            attention_mask are not what they should be.
        ValueError: their shapes do not fit; or the head is not a plain weight, or the model does
            more to its logits than scale and cap them.
    """
    return call_with_lazy_logits(
        model,
        lambda logits: logits,
        input_ids,
        attention_mask,
        temperature=temperature,
        vocab_size=vocab_size,
        **model_kwargs,
    )


def call_with_lazy_logits(
    model: nn.Module,
    function: Callable[[LazyLogits], T],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    **model_kwargs: Any,
) -> T:
    """function(lazy_logits), run inside the outermost module's forward, whose output its result is.

    Args and Raises as in lazy_logits.

    Args:
        function: computes the whole loss from LazyLogits; runs under the model's autocast.

    Returns:
        What function returned.
    """
    causal_lm = causal_lm_of(model)
    if not callable(function):
        raise TypeError(f"function: expected one of LazyLogits, got {got(function)}")
    _check_tokens(input_ids, attention_mask)
    bare_forward = causal_lm.forward

    def forward(*args: Any, **kwargs: Any) -> T:
        capture = forward_without_head(causal_lm, bare_forward, *args, **kwargs)
        logits = capture.lazy_logits(causal_lm, temperature, vocab_size)
        with torch.autocast(logits.hidden.device.type, *capture.autocast):
            return function(logits)

    # model.compile() would trace into the replacement, which changes modules as it runs.
    with _replaced_forward(causal_lm, torch.compiler.disable(forward)):
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **model_kwargs,
        )


def pad_completions(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch prompts with their completions, and mark where completion tokens are predicted.

    `lazy_logits(model, input_ids, attention_mask)[predicts]` are the logits of every completion
    token, one row each, in the order of the completions: the same for a student and a teacher whose
    prompts differ.

    Args:
        prompts: token ids of each prompt, at least one.
        completions: token ids of each completion, EOS included.
        device: where the tensors go.

    Returns:
        input_ids, attention_mask (int64) and predicts (bool), each [B, T]. The padding, id 0, is on
        the right, so that positions start at 0; the masks come from lengths, since a pad id is
        often EOS.
    """
    device = _checked_device(device)
    before, after = _checked_ids("prompts", prompts, 1), _checked_ids("completions", completions, 0)
    if len(before) != len(after) or not before:
        raise ValueError(
            "prompts, completions: expected as many of one as of the other, and at least one, got "
            f"{len(before)} and {len(after)}"
        )
    rows = [torch.cat(row) for row in zip(before, after, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    start = torch.tensor([len(p) for p in before])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(ids.shape[1])
    predicts = (position >= start - 1) & (position < end - 1)
    return ids.to(device), (position < end).long().to(device), predicts.to(device)


def _checked_ids(name: str, rows: Sequence[list[int]], least: int) -> list[Tensor]:
    """Token ids [T] of each row, at least so many."""
    try:
        tensors = [torch.tensor([*row]) for row in rows]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected lists of token ids, got others ({error})") from error
    for number, (row, tensor) in enumerate(zip(rows, tensors, strict=True)):
        if len(tensor) < least or (len(tensor) and tensor.dtype != torch.int64):
            raise ValueError(
                f"{name}: expected lists of at least {least} token ids, got {row!r} in row {number}"
            )
    return [tensor.long() for tensor in tensors]


def _checked_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"device: expected a torch.device, got {device!r}") from error


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise unless these are [B, T]. Masks of four dimensions, of packed rows, are the model's."""
    check_token_ids("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids: expected [B, T], got {tuple(input_ids.shape)}; add a dimension for one row"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.is_complex():
        raise TypeError(f"attention_mask: expected a real tensor, got {got(attention_mask)}")
    if attention_mask.dim() != 4 and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; it has 1 for tokens, 0 for padding"
        )


@dataclass
class _Capture:
    """What the head was given, and what the model made of the probes that it returned."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    answers: Tensor | None = None
    calls: int = 0
    output: Any = None  # the model's
    autocast: tuple[torch.dtype, bool] = (torch.bfloat16, False)

    def lazy_logits(
        self, model: PreTrainedModel, temperature: float, vocab_size: int | None
    ) -> LazyLogits:
        name = type(model).__name__
        if self.calls != 1 or self.hidden is None or self.weight is None or self.answers is None:
            raise ValueError(
                f"model: expected {name} to call its output embeddings once per forward pass, got "
                f"{self.calls} calls; its logits cannot be computed lazily"
            )
        if plain(self.weight).untyped_storage().nbytes() == 0 < self.weight.numel():
            raise ValueError(
                f"model: FSDP has freed the weight of {name}'s head after its forward pass; wrap "
                "the head with reshard_after_forward=False, or leave it to the root module"
            )
        scale, softcap = _scale_and_softcap(self.answers, name)
        return LazyLogits(
            self.hidden, self.weight, self.bias, softcap, scale, temperature, vocab_size
        )


def forward_without_head(
    model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> _Capture:
    """Call a model's forward, whose head keeps its input and answers with the probes."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no output embeddings; pass a model with a "
            "language-model head"
        )
    capture = _Capture()

    def keep_input(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        capture.calls += 1
        capture.hidden = hidden
        capture.weight, capture.bias = weight_and_bias(head)
        device_type = hidden.device.type
        capture.autocast = (
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        probes = torch.tensor(_PROBES, dtype=dtype, device=hidden.device)
        return probes.repeat(*hidden.shape[:-1], 1)

    with _replaced_forward(head, keep_input):
        capture.output = forward(*args, **kwargs)
        logits = capture.output.logits
    if logits.shape[-1] != len(_PROBES):
        raise ValueError(
            f"model: {type(model).__name__} computes logits without calling its output "
            "embeddings; they cannot be computed lazily"
        )
    if capture.hidden is not None and logits.shape[:-1] != capture.hidden.shape[:-1]:
        raise ValueError(
            f"model: {type(model).__name__} gives logits [..., V] of leading shape "
            f"{tuple(logits.shape[:-1])} from hidden states of {tuple(capture.hidden.shape[:-1])}; "
            "build LazyLogits from its hidden states by hand"
        )
    capture.answers = logits.reshape(-1, len(_PROBES))[0].detach().double()
    return capture


def _scale_and_softcap(answers: Tensor, name: str) -> tuple[float, float | None]:
    """Which scale * x, or softcap * tanh(x / softcap), turns the probes into the answers."""
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=answers.device)
    scale = float(answers[-1] / probes[-1])
    if torch.allclose(answers, scale * probes, rtol=1e-6, atol=0):
        return scale, None
    softcap = float(answers[-1])
    if softcap > 0 and torch.allclose(answers, softcap * torch.tanh(probes / softcap), rtol=1e-5):
        return 1.0, softcap
    raise ValueError(
        f"model: expected {name} to scale or softcap its logits at most, but it maps {_PROBES} to "
        f"{tuple(round(x, 4) for x in answers.tolist())}; build LazyLogits from its hidden states "
        "by hand"
    )


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP or PEFT."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif "peft" in sys.modules and isinstance(inner, sys.modules["peft"].PeftModel):
            inner = inner.get_base_model()
        else:
            raise TypeError(
                "model: expected a causal language model of transformers, bare or in DDP or "
                f"PEFT, got {type(inner).__name__}; compile its decoder (model.model), not the "
                "whole"
            )
    return inner


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module instance another forward for a while."""
    own = module.__dict__.get("forward")  # accelerate, for example, puts one there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

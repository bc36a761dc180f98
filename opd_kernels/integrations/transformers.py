"""LazyLogits of any causal language model of transformers, with the model's own head options.

The call goes through the outermost module, so that DDP and FSDP run their hooks: calling the
decoder directly would silently leave gradients unsynchronised. For one call the head's forward is
replaced by a function that stores its input and weight and returns a few probe values instead of
logits. The model's output for the probes then shows its scale and softcap, for every architecture
in the same way. A model that changes its logits in any other way is refused.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_kernels.checks import check_flags, check_token_ids, got
from opd_kernels.integrations._heads import weight_and_bias
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.parallel import plain

T = TypeVar("T")

# Powers of two, so that a scale is recovered exactly. The last one saturates any softcap.
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
    """Return LazyLogits whose materialize() equals the model's logits divided by temperature.

    Compute the loss after the forward pass. Under FSDP, where the head's weight is complete only
    during the forward pass, use call_with_lazy_logits instead.

    Args:
        model: a causal language model of transformers, bare or wrapped in DDP or PEFT. Its decoder
            (model.model) may be compiled; torch.compile(model) is refused.
        input_ids: [B, T] token ids.
        attention_mask: [B, T] 1 for tokens, 0 for padding.
        temperature: same as in LazyLogits.
        vocab_size: same as in LazyLogits; default all rows of the head.
        **model_kwargs: passed to the model, for example position_ids.

    Returns:
        LazyLogits with hidden [B, T, D]. Gradients flow into the decoder, the head and LoRA
        adapters on the head.

    Raises:
        TypeError: model is not a causal language model of transformers, or input_ids or
            attention_mask has a wrong type or dtype.
        ValueError: input_ids or attention_mask has a wrong shape, the head is not a plain weight,
            or the model does more to its logits than scale and softcap them.
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
    function: Callable[..., T],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    with_router_loss: bool = False,
    **model_kwargs: Any,
) -> T:
    """Run the model and call function(lazy_logits) inside its forward pass.

    The function's result is the output of the outermost module, so that DDP and FSDP see it.

    Args:
        function: computes the loss from LazyLogits; runs under the autocast that is active at the
            model's head.
        with_router_loss: call function(lazy_logits, router_loss) instead. router_loss is the
            auxiliary loss of a mixture of experts whose config has output_router_logits, times the
            model's own coefficient; 0.0 for other models. Transformers adds it to a loss of labels.

    Other arguments and Raises are those of lazy_logits.

    Returns:
        The result of function.
    """
    causal_lm = causal_lm_of(model)
    if not callable(function):
        raise TypeError(f"function: expected a function of LazyLogits, got {got(function)}")
    check_flags(with_router_loss=with_router_loss)
    _check_tokens(input_ids, attention_mask)
    bare_forward = causal_lm.forward

    def forward(*args: Any, **kwargs: Any) -> T:
        capture = forward_without_head(causal_lm, bare_forward, *args, **kwargs)
        logits = capture.lazy_logits(causal_lm, temperature, vocab_size)
        with torch.autocast(logits.hidden.device.type, *capture.autocast):
            extra = (router_loss(causal_lm, capture.output),) if with_router_loss else ()
            return function(logits, *extra)

    # Without disable, a model that was compiled in place with model.compile() would trace into the
    # replacement, which changes the head while it runs.
    with _replaced_forward(causal_lm, torch.compiler.disable(forward)):
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **model_kwargs,
        )


def router_loss(model: PreTrainedModel, output: Any) -> Tensor | float:
    """Return the auxiliary loss in a model's output times the model's coefficient, or 0.0."""
    aux_loss = output.get("aux_loss")
    if aux_loss is None:
        return 0.0
    for owner in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if hasattr(owner, name):
                return getattr(owner, name) * torch.as_tensor(aux_loss, device=output.logits.device)
    raise ValueError(
        f"model: {type(model).__name__} returns an auxiliary loss of its router without a "
        "coefficient; set router_aux_loss_coef in its config"
    )


def pad_completions(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch prompts with their completions, and mark the positions that predict completion tokens.

    `lazy_logits(model, input_ids, attention_mask)[predicts]` are the logits of all completion
    tokens, one row per token, in the order of the completions. The rows of a student and a teacher
    with different prompts therefore match.

    Args:
        prompts: token ids of each prompt, at least one id per prompt.
        completions: token ids of each completion, including EOS.
        device: device of the returned tensors.

    Returns:
        input_ids, attention_mask (int64) and predicts (bool), each [B, T]. Padding (id 0) is on the
        right, so that positions start at 0. The masks are computed from lengths, since the pad id
        is often EOS.

    Raises:
        TypeError: prompts or completions are not lists of ints, or device is not a device.
        ValueError: there are no prompts, a prompt is empty, or the numbers of prompts and
            completions differ.
    """
    device = _checked_device(device)
    before, after = _checked_ids("prompts", prompts, 1), _checked_ids("completions", completions, 0)
    if len(before) != len(after) or not before:
        raise ValueError(
            "prompts, completions: expected the same number of both, and at least one, got "
            f"{len(before)} and {len(after)}"
        )
    rows = [torch.cat(row) for row in zip(before, after, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    start = torch.tensor([len(p) for p in before])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(ids.shape[1])
    predicts = (position >= start - 1) & (position < end - 1)
    return ids.to(device), (position < end).long().to(device), predicts.to(device)


def _checked_ids(name: str, rows: Sequence[list[int]], min_length: int) -> list[Tensor]:
    """Return the token ids [T] of each row. Raise if a row has fewer than min_length."""
    try:
        tensors = [torch.tensor([*row]) for row in rows]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected lists of token ids, got other values ({error})"
        ) from error
    for number, (row, tensor) in enumerate(zip(rows, tensors, strict=True)):
        if len(tensor) < min_length or (len(tensor) and tensor.dtype != torch.int64):
            raise ValueError(
                f"{name}: expected lists of at least {min_length} token ids, got {row!r} in row "
                f"{number}"
            )
    return [tensor.long() for tensor in tensors]


def _checked_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"device: expected a torch.device, got {device!r}") from error


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise TypeError or ValueError unless both are [B, T]. Masks with four dimensions, for packed
    rows, are left to the model's own checks.
    """
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
            f"{tuple(attention_mask.shape)}; pass 1 for tokens and 0 for padding"
        )


@dataclass
class _Capture:
    """The input and parameters of the head, and the model's output for the probes."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    probe_logits: Tensor | None = None  # [len(_PROBES)]
    calls: int = 0  # of the head
    output: Any = None  # of the model
    autocast: tuple[torch.dtype, bool] = (torch.bfloat16, False)  # at the head: dtype, enabled

    def lazy_logits(
        self, model: PreTrainedModel, temperature: float, vocab_size: int | None
    ) -> LazyLogits:
        name = type(model).__name__
        hidden, weight, probe_logits = self.hidden, self.weight, self.probe_logits
        if self.calls != 1 or hidden is None or weight is None or probe_logits is None:
            raise ValueError(
                f"model: expected {name} to call its output embeddings once per forward pass, got "
                f"{self.calls} calls; its logits cannot be computed lazily"
            )
        if plain(weight).untyped_storage().nbytes() == 0 < weight.numel():
            raise ValueError(
                f"model: FSDP has freed the weight of {name}'s head after its forward pass; wrap "
                "the head with reshard_after_forward=False, or leave it to the root module"
            )
        scale, softcap = _scale_and_softcap(probe_logits, name)
        return LazyLogits(hidden, weight, self.bias, softcap, scale, temperature, vocab_size)


def forward_without_head(
    model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> _Capture:
    """Call a model's forward with a head that stores its input and returns the probes."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no output embeddings; pass a model with a "
            "language-model head"
        )
    capture = _Capture()

    def capture_input(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
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

    with _replaced_forward(head, capture_input):
        capture.output = forward(*args, **kwargs)
        logits = capture.output.logits
    if logits.shape[-1] != len(_PROBES):
        raise ValueError(
            f"model: {type(model).__name__} computes logits without calling its output "
            "embeddings; they cannot be computed lazily"
        )
    if capture.hidden is not None and logits.shape[:-1] != capture.hidden.shape[:-1]:
        raise ValueError(
            f"model: {type(model).__name__} returns logits [..., V] with the leading shape "
            f"{tuple(logits.shape[:-1])} for hidden states with {tuple(capture.hidden.shape[:-1])};"
            " build LazyLogits from its hidden states yourself"
        )
    capture.probe_logits = logits.reshape(-1, len(_PROBES))[0].detach().double()
    return capture


def _scale_and_softcap(probe_logits: Tensor, name: str) -> tuple[float, float | None]:
    """Return the scale of scale * x, or the softcap of softcap * tanh(x / softcap), that maps the
    probes to probe_logits. Raise ValueError if neither does.
    """
    probes = torch.tensor(_PROBES, dtype=torch.float64, device=probe_logits.device)
    scale = float(probe_logits[-1] / probes[-1])
    if torch.allclose(probe_logits, scale * probes, rtol=1e-6, atol=0):
        return scale, None
    softcap = float(probe_logits[-1])
    capped = softcap * torch.tanh(probes / softcap)
    if softcap > 0 and torch.allclose(probe_logits, capped, rtol=1e-5):
        return 1.0, softcap
    raise ValueError(
        f"model: expected {name} to only scale or softcap its logits, but it maps {_PROBES} to "
        f"{tuple(round(x, 4) for x in probe_logits.tolist())}; build LazyLogits from its hidden "
        "states yourself"
    )


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DDP or PEFT wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif "peft" in sys.modules and isinstance(inner, sys.modules["peft"].PeftModel):
            inner = inner.get_base_model()
        else:
            raise TypeError(
                "model: expected a causal language model of transformers, bare or wrapped in DDP "
                f"or PEFT, got {type(inner).__name__}; compile its decoder (model.model), not the "
                "whole model"
            )
    return inner


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module instance inside the context."""
    previous = module.__dict__.get("forward")  # accelerate, for example, sets one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous

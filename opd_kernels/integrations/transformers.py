"""LazyLogits of any causal language model of transformers, with the model's own head options.

The call goes through the outermost module, so that DDP and FSDP run their hooks: calling the
decoder directly would silently leave gradients unsynchronised. Hooks take the head's input and
replace the model's output, see _capture.py.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_kernels.checks import check_flags, check_token_ids, got
from opd_kernels.integrations._capture import captured_head
from opd_kernels.integrations._heads import check_rows_share_adapters
from opd_kernels.lazy_logits import LazyLogits

T = TypeVar("T")


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
    causal_lm, wrappers = _with_wrappers(model)
    if not callable(function):
        raise TypeError(f"function: expected a function of LazyLogits, got {got(function)}")
    check_flags(with_router_loss=with_router_loss)
    _check_tokens(input_ids, attention_mask, model_kwargs.get("past_key_values"))
    _check_model_kwargs(causal_lm, model_kwargs)
    results: list[T] = []

    def compute(output: Any) -> Any:
        logits = capture.lazy_logits(output, temperature, vocab_size)
        with torch.autocast(logits.hidden.device.type, *capture.autocast):
            extra = (router_loss(causal_lm, output),) if with_router_loss else ()
            results.append(function(logits, *extra))
        return () if results[0] is None else results[0]  # None would leave the output as it is

    # DDP must see the loss as the output of the module inside it. Hooks of FSDP on this module, and
    # those of the user, come after this one.
    is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    module: Any = model.module if is_ddp else model
    with captured_head(causal_lm, wrappers) as capture:
        capture.on_output = compute
        handle = module.register_forward_hook(capture.replace_output, prepend=True)
        try:
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **{"use_cache": False, "return_dict": True} | model_kwargs,
            )
        finally:
            handle.remove()
    if not results:
        raise ValueError(
            f"model: expected {type(model).__name__} to call its forward method, got an output "
            "without it; its logits cannot be computed lazily"
        )
    return results[0] if results[0] is None else output


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


def _check_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, past_key_values: Any = None
) -> None:
    """Raise TypeError or ValueError unless both are [B, T]. Masks with four dimensions, for packed
    rows, and masks that also cover a cache are left to the model's own checks.
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
    is_plain = attention_mask.dim() != 4 and past_key_values is None
    if is_plain and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; pass 1 for tokens and 0 for padding"
        )


def _check_model_kwargs(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
    """Raise for arguments of the model that contradict lazy logits."""
    for name in ("labels", "shift_labels"):
        if model_kwargs.get(name) is not None:
            raise TypeError(
                f"{name}: expected none, since the model would compute its loss from full logits, "
                f"got {got(model_kwargs[name])}; use lazy_logits(...).log_prob, or patch(model) of "
                "opd_kernels.integrations.labels"
            )
    if model_kwargs.get("return_dict") not in (None, True):
        raise ValueError(
            f"return_dict: expected True, got {model_kwargs['return_dict']}; the logits are read "
            "from the model's output by name"
        )
    check_rows_share_adapters(model.get_output_embeddings(), model_kwargs.get("adapter_names"))


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DDP or PEFT wrappers."""
    return _with_wrappers(model)[0]


def _with_wrappers(model: nn.Module) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Return the transformers model and the modules around it, from the outermost one."""
    inner: Any = model
    wrappers = []
    while not isinstance(inner, PreTrainedModel):
        wrappers.append(inner)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif "peft" in sys.modules and isinstance(inner, _peft_wrappers()):
            # Prompt learning has the model itself as base_model, the tuners have it inside.
            inner = inner.model if hasattr(type(inner), "inject_adapter") else inner.base_model
        else:
            raise TypeError(
                "model: expected a causal language model of transformers, bare or wrapped in DDP "
                f"or PEFT, got {type(inner).__name__}; compile its decoder (model.model), not the "
                "whole model"
            )
    return inner, wrappers


def _peft_wrappers() -> tuple[Any, ...]:
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    return PeftModel, PeftMixedModel, BaseTuner

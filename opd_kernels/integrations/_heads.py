"""Weight and bias of a transformers model's language-model head, including PEFT adapters."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from opd_kernels.parallel import is_dtensor


def weight_and_bias(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight [V, D] and bias [V] that the head applies to hidden [..., D], with active
    adapters merged; both are differentiable.
    """
    head = getattr(head, "_orig_mod", head)  # of torch.compile(head)
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(head, AuxiliaryTrainingWrapper):
            active = head.active_adapters
            # PEFT's own condition: an active adapter that has no copy of the head leaves it as is.
            if head.disable_adapters or not active or not {*active} <= head._adapters:
                return weight_and_bias(head.original_module, hidden)
            if isinstance(head, ModulesToSaveWrapper):
                return weight_and_bias(head.modules_to_save[active[0]], hidden)
            return _affine_map(head, head.original_module, hidden)
        if isinstance(head, BaseTunerLayer):
            return _with_adapters(head, hidden)
    return _plain_weight(head)


def check_head_is_loaded(head: nn.Module) -> None:
    """Raise ValueError if the head has no data, before a forward pass that would fail elsewhere."""
    for name, parameter in head.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: the head's {name} is offloaded or was never loaded: expected it in "
                "memory, got a tensor on the meta device; keep the head on a device, for example "
                'with device_map={"": 0} or an entry for lm_head, or load the model without '
                "offloading"
            )


def check_rows_share_adapters(head: nn.Module, adapter_names: Any) -> None:
    """Raise ValueError if PEFT's adapter_names give the rows of a batch different heads."""
    if adapter_names is None or "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            "adapter_names: expected one head for all rows, got a model whose adapters change the "
            "head; call model.set_adapter(name) and pass the rows of one adapter at a time"
        )


def _plain_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = type(head).__name__
        kind = kind if kind != "Linear" else f"{type(head).__module__}.{kind}"
        raise ValueError(
            f"model: expected the head to be an nn.Linear, got {kind}; dequantise it, for example "
            "by excluding lm_head from quantisation, or build LazyLogits from the model's hidden "
            "states yourself"
        )
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        # DTensors come from tensor parallelism here: FSDP gathers its own in the forward pass.
        if tensor is not None and type(tensor.data) is not Tensor and not is_dtensor(tensor):
            raise ValueError(
                f"model: expected the head's {name} to be a plain tensor, got "
                f"{type(tensor.data).__name__}; gather or dequantise it first, for example by "
                "excluding lm_head from quantisation"
            )
    return head.weight, head.bias


def _with_adapters(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the operands of a layer of a PEFT tuner."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = head.get_base_layer()
    weight, bias = _plain_weight(base)
    if isinstance(head.base_layer, BaseTunerLayer):  # PeftMixedModel nests the layers of tuners
        return _affine_map(head, base, hidden)
    if head.disable_adapters or head.merged:
        return weight, bias
    if is_dtensor(weight):
        raise ValueError(
            "model: adapters on a head that is split over ranks cannot be merged into its weight; "
            "exclude the head from target_modules"
        )
    if not isinstance(head, LoraLinear):
        return _affine_map(head, base, hidden)
    active = [adapter for adapter in head.active_adapters if adapter in head.lora_A]
    _check_dropout(head, active)
    if any(adapter in head.lora_variant or head.lora_bias[adapter] for adapter in active):
        return _affine_map(head, base, hidden)
    for adapter in active:
        weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def _check_dropout(head: Any, adapters: list[str]) -> None:
    for adapter in adapters:
        dropout = head.lora_dropout[adapter]
        if head.training and not isinstance(dropout, nn.Identity):
            raise ValueError(
                f"model: LoRA adapter {adapter!r} on the head has {type(dropout).__name__} before "
                "it, so it cannot be merged into the weight; set lora_dropout=0 for the head, or "
                "exclude the head from the adapter"
            )


def _affine_map(head: nn.Module, base: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a head that is an affine map, from its outputs for the rows of the
    identity matrix and for zeros. This holds for every adapter that PEFT can merge, and costs as
    much as D tokens. One row of hidden tells whether the head is affine.
    """
    _plain_weight(base)
    dim = hidden.shape[-1]
    sample = hidden.detach().reshape(-1, dim)[:1]
    inputs = torch.eye(dim, dtype=hidden.dtype, device=hidden.device)
    outputs = head.forward(torch.cat([inputs, torch.zeros_like(inputs[:1]), sample]))
    bias = outputs[dim]
    weight = (outputs[:dim] - bias).t().contiguous()
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(weight.dtype, torch.float32)
        expected = outputs[dim + 1 :].to(wide)
        actual = sample.to(wide) @ weight.to(wide).t() + bias.to(wide)
        tolerance = 1e-3 if weight.dtype.itemsize >= 4 else 5e-2
        error, size = (x.abs().max() if x.numel() else 0.0 for x in (actual - expected, expected))
    if not error <= tolerance * size:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(
            f"model: expected the head to be an affine map of its input, got {kind}, which is not, "
            "such as an adapter with dropout in training mode; set its dropout to 0, or exclude "
            "the head from the adapter"
        )
    return weight, bias

"""Weight and bias of a transformers model's language-model head, including PEFT adapters."""

import sys
from typing import Any

from torch import Tensor, nn

from opd_kernels.parallel import is_dtensor


def weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight [V, D] and bias [V] that the head applies, with active LoRA adapters
    merged; both are differentiable.
    """
    if "peft" in sys.modules:
        from peft.tuners.lora import Linear as LoraLinear
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            return _plain_weight(
                head.original_module
                if head.disable_adapters
                else head.modules_to_save[head.active_adapters[0]]
            )
        if isinstance(head, LoraLinear):
            return _merged_lora(head)
    return _plain_weight(head)


def _plain_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"model: expected the head to be an nn.Linear, got {type(head).__name__}; dequantise "
            "it, for example by excluding lm_head from quantisation"
        )
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None:
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"model: the head's {name} is offloaded to the meta device; exclude lm_head from "
                "offloading"
            )
        # DTensors come from tensor parallelism here: FSDP gathers its own in the forward pass.
        if type(tensor.data) is not Tensor and not is_dtensor(tensor):
            raise ValueError(
                f"model: expected the head's {name} to be a plain tensor, got "
                f"{type(tensor.data).__name__}; gather or dequantise it first"
            )
    return head.weight, head.bias


def _merged_lora(head: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = _plain_weight(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return weight, bias
    if is_dtensor(weight):
        raise ValueError(
            "model: LoRA on a head that is split over ranks cannot be merged into its weight; "
            "exclude the head from target_modules"
        )
    for adapter in head.active_adapters:
        if adapter not in head.lora_A:
            continue
        dropout = head.lora_dropout[adapter]
        for obstacle, present in (
            (
                f"{type(dropout).__name__} before it",
                not isinstance(dropout, nn.Identity) and head.training,
            ),
            ("a LoRA variant", adapter in head.lora_variant),
            ("a LoRA bias", head.lora_bias[adapter]),
        ):
            if present:
                raise ValueError(
                    f"model: LoRA adapter {adapter!r} on the head has {obstacle}, so it cannot be "
                    "merged into the weight; use plain LoRA without dropout on the head, or "
                    "exclude the head from the adapter"
                )
        weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias

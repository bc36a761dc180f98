"""Cross-entropy of labels without logits, in the forward pass of a transformers model."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from opd_kernels.checks import got
from opd_kernels.integrations._capture import captured_head
from opd_kernels.integrations.transformers import router_loss

# Matches a loss of unchanged logits and labels. Git, for example, slices and shifts both first.
_SHIFTED_LOSS = re.compile(r"self\.loss_function\(\s*(logits=)?(lm_)?logits,\s*(labels=)?labels,")


def patch(model: PreTrainedModel) -> PreTrainedModel:
    """Make model(..., labels=labels) compute its cross-entropy without the logits.

    The loss equals that of transformers: labels [B, T] are shifted by one, labels of -100 are
    ignored, and the loss is the mean, or the sum divided by num_items_in_batch. A mixture of
    experts adds its auxiliary loss. The output has no logits. Calls without labels do not change.

    Args:
        model: a causal language model of transformers, before it is wrapped (DDP, PEFT).

    Returns:
        The same model.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: the model's class computes another loss of labels. Calls of the patched model
            raise what lazy_logits raises.
    """
    _check_labels_loss(model)
    model.forward = MethodType(_wrap_forward(type(model).forward), model)
    return model


def _wrap_forward(bare_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a class's forward, so that it computes the loss of labels from LazyLogits."""

    @torch.compiler.disable
    def with_labels(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        ignore_index: int,
        **kwargs: Any,
    ) -> Any:
        bare = MethodType(bare_forward, self)
        with captured_head(self) as capture:
            model_output = bare(*args, **kwargs | {"return_dict": True})
            logits = capture.lazy_logits(model_output, 1.0, None)
        if shift_labels is None:
            assert labels is not None
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.hidden.device)
        with torch.autocast(logits.hidden.device.type, *capture.autocast):
            log_probs = logits.log_prob(shift_labels, ignore_index=ignore_index)
        count = (shift_labels != ignore_index).sum()
        loss = -log_probs.sum() / (count if num_items_in_batch is None else num_items_in_batch)
        loss = loss + router_loss(self, model_output)
        output = {name: x for name, x in model_output.items() if name != "logits"}
        return type(model_output)(loss=loss, **output)

    @wraps(bare_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return bare_forward(self, *args, **kwargs)
        targets = {"labels": labels, "shift_labels": shift_labels, "ignore_index": ignore_index}
        targets["num_items_in_batch"] = num_items_in_batch
        return with_labels(self, *args, **targets, **kwargs)

    return forward


def _check_labels_loss(model: PreTrainedModel) -> None:
    """Raise ValueError unless the class computes the shifted cross-entropy of labels, and adds at
    most the auxiliary loss of a mixture of experts.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a causal language model of transformers, got {got(model)}; patch the "
            "model before you wrap it"
        )
    code = inspect.getsource(type(model).forward)
    reason = None
    if not _SHIFTED_LOSS.search(code) or model.loss_function is not ForCausalLMLoss:
        reason = "does not compute it with transformers' ForCausalLMLoss"
    elif "z_loss" in code:
        reason = "adds a z-loss of the logits"
    elif "forward" in model.__dict__:
        reason = "already has another forward on this instance (call patch first)"
    if reason is not None:
        raise ValueError(
            f"model: expected the loss of labels to be the shifted cross-entropy, but "
            f"{type(model).__name__} {reason}; call lazy_logits(model, ...).log_prob yourself"
        )

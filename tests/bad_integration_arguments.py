"""Wrong values for every parameter of the integrations."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from opd_kernels import LazyLogits
from opd_kernels.integrations import labels, liger, transformers
from tests.bad_arguments import FLAG, INT, NUMBER, Case, floats, ids, ints, lazy, tensors
from tests.tiny_models import tiny_model


@cache
def model() -> nn.Module:
    return tiny_model("llama")


LIGER_NUMBERS = {"ignore_index": INT, "temperature": (*NUMBER, 0.0, -1.0)}


def liger_operands(with_labels: str, *others: str) -> dict[str, Any]:
    student, teacher = lazy((6,)), lazy((6,), dim=5)
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    operands = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    return dict(zip(names, operands, strict=True)) | {with_labels: ints(6)}


LIGER_TENSORS = {
    "student_input": (*tensors(6, 8), floats(6, 7), floats(5, 8)),
    "student_weight": (*tensors(20, 8), floats(8, 20)),
    "teacher_input": (*tensors(6, 5), floats(6, 7), floats(5, 5)),
    "teacher_weight": (*tensors(20, 5), floats(5, 20)),
}
LIGER_LABELS = tuple(x for x in ids(6) if x is not None)
TOKENS = {
    "model": (None, "x", nn.Linear(2, 2)),
    "input_ids": (*(x for x in ids(2, 5) if not isinstance(x, Tensor) or x.device.type != "meta"),
                  ints(5)),
    "attention_mask": ("x", [[1] * 5] * 2, floats(2, 5, dtype=torch.complex64), ints(2, 4),
                       ints(5)),
    "temperature": (*NUMBER, 0.0, -1.0),
    "vocab_size": (*(x for x in INT if x is not None), 0, 98),
}  # fmt: skip
ANY_KEYWORD = {"model_kwargs": "the model's own"}


def module(cls: type, forward: Callable[[], dict[str, Any]]) -> Callable[..., Any]:
    """Return a function that constructs a module and calls it: some errors need operands."""
    return lambda **options: cls(**options)(**forward())


CASES = {
    "integrations.transformers.lazy_logits": Case(
        lambda **o: transformers.lazy_logits(**tokens() | o), dict, TOKENS, ANY_KEYWORD
    ),
    "integrations.transformers.call_with_lazy_logits": Case(
        lambda **o: transformers.call_with_lazy_logits(**{"function": len_of} | tokens() | o), dict,
        TOKENS | {"function": (None, "x", 3), "with_router_loss": FLAG}, ANY_KEYWORD,
    ),
    "integrations.transformers.pad_completions": Case(
        lambda **o: transformers.pad_completions(
            **{"prompts": [[1, 2], [3]], "completions": [[4], [5, 6]], "device": "cpu"} | o
        ), dict,
        {
            "prompts": (None, 3, "x", [], [[1], []], [[1]], [["a"], [1]], [[1.5], [1]], [1, 2]),
            "completions": (None, 3, "x", [], [[1]], [["a"], [1]], [[1.5], [1]], [1, 2]),
            "device": (1.5, "nowhere"),
        },
    ),
    "integrations.labels.patch": Case(
        labels.patch, lambda: {"model": tiny_model("llama")}, {"model": TOKENS["model"]}
    ),
    "integrations.trl.distil_with": Case(
        lambda trainer: distil(trainer), lambda: {"trainer": trainer()},
        {"trainer": (None, "x", nn.Linear(2, 2))}, {"options": "distillation_loss's own"},
    ),
    "integrations.liger.LigerFusedLinearJSDLoss": Case(
        module(liger.LigerFusedLinearJSDLoss, partial(liger_operands, "true_labels")), dict,
        LIGER_NUMBERS | {"weight_hard_loss": NUMBER, "weight_soft_loss": NUMBER,
                         "beta": (*NUMBER, -0.1, 1.1), "return_soft_hard_loss": FLAG},
        {"compiled": "not used", "chunk_size": "not used", "options": "distillation_loss's own"},
    ),
    "integrations.liger.LigerFusedLinearJSDLoss.forward": Case(
        lambda **o: liger.LigerFusedLinearJSDLoss()(**liger_operands("true_labels") | o), dict,
        LIGER_TENSORS
        | {"true_labels": (*LIGER_LABELS, None, ints(5)), "student_bias": (*tensors(20)[1:],
           floats(19)), "teacher_bias": (*tensors(20)[1:], floats(19))},
    ),
    "integrations.liger.LigerFusedLinearJSD": Case(
        module(liger.LigerFusedLinearJSD, partial(liger_operands, "shift_labels")), dict,
        LIGER_NUMBERS | {"jsd_beta": (*NUMBER, -0.1, 1.1)},
        {"accum_dtype": "not used", "options": "distillation_loss's own"},
    ),
    "integrations.liger.LigerFusedLinearJSD.forward": Case(
        lambda **o: liger.LigerFusedLinearJSD()(**liger_operands("shift_labels") | o), dict,
        LIGER_TENSORS | {"shift_labels": (*LIGER_LABELS, ints(5))},
    ),
}  # fmt: skip


def tokens() -> dict[str, Any]:
    return {"model": model(), "input_ids": ints(2, 5) + 4}


def len_of(logits: LazyLogits) -> int:
    return len(logits.shape)


def trainer() -> Any:
    """Return TRL's trainer without initialising it, which would need a model."""
    from trl import DistillationTrainer

    return DistillationTrainer.__new__(DistillationTrainer)


def distil(trainer: Any) -> Any:
    from opd_kernels.integrations.trl import distil_with  # imports trl

    return distil_with(trainer)

"""From the recipe's keys to the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd_kernels import (
    DistillationOutput,
    LazyLogits,
    SparseLogits,
    distillation_loss,
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
)
from opd_kernels.loss.objective import Objective
from trainer.config import DistillationConfig, load_function
from trainer.errors import RunStoppedError, explained

OFF_POLICY = (
    "Completions are sampled at another temperature than the loss's, or with top_p below 1, so the "
    "loss is not of the distribution that they come from: leave out sampling_temperature and top_p "
    "to be on-policy."
)


def build_loss(config: DistillationConfig) -> Callable[..., DistillationOutput]:
    """distillation_loss with the recipe's objective, k and support; entropies come with it."""
    objectives: dict[str, Objective] = {
        "reverse_kl": partial(reverse_kl, stop_gradient=config.stop_gradient, tail=config.tail),
        "forward_kl": partial(forward_kl, tail=config.tail),
        "jsd": partial(jsd, beta=config.beta, tail=config.tail),
        "policy_gradient": policy_gradient,
    }
    objective = objectives.get(config.objective) or load_function(
        "objective", config.objective, objectives
    )
    if config.forward_kl_coef > 0:
        uncertain = partial(forward_kl, tail=config.tail)
        mixture = (config.forward_kl_coef, config.forward_kl_min_entropy)
        objective = WhereUncertain(objective, uncertain, *mixture)
    if config.max_token_loss is not None:
        objective = Clamped(objective, config.max_token_loss)
    # A step puts its samples in the place of "sampled".
    support = "student" if config.support == "sampled" else config.support
    loss = partial(distillation_loss, k=config.k, support=support, missing=config.missing)
    loss = partial(loss, objective=objective, entropy=True)
    return loss if config.objective in objectives else partial(_stopping, config.objective, loss)


def _stopping(
    name: str, loss: Callable[..., DistillationOutput], *logits: LazyLogits, **options: Any
) -> DistillationOutput:
    """The loss of a recipe's own function, where that cannot be used the run stops."""
    expected = f"objective: expected a loss per token of (student, teacher) from {name}"
    with explained(expected, RunStoppedError):
        return loss(*logits, **options)


@dataclass(frozen=True)
class WhereUncertain:
    """An objective plus coefficient * another on tokens where the teacher's entropy is above a
    bound in nats: where the teacher has several answers, forward KL keeps the student from
    choosing one.
    """

    objective: Objective
    other: Objective
    coefficient: float
    min_entropy: float

    def __call__(self, student: SparseLogits, teacher: SparseLogits) -> Tensor:
        assert teacher.entropy is not None
        added = torch.where(teacher.entropy > self.min_entropy, self.other(student, teacher), 0.0)
        return self.objective(student, teacher) + self.coefficient * added


@dataclass(frozen=True)
class Clamped:
    """An objective whose loss of a token is at most so many nats; above that it has no gradient."""

    objective: Objective
    most: float

    def __call__(self, student: SparseLogits, teacher: SparseLogits) -> Tensor:
        return self.objective(student, teacher).clamp_max(self.most)

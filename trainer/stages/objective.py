"""The distillation loss that a config describes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opd_kernels import DistillationOutput, SparseLogits, distillation_loss
from opd_kernels.divergences import forward_kl, jsd, policy_gradient, reverse_kl
from trainer.config import DistillationConfig, load_function
from trainer.errors import RunStoppedError, convert_errors

Objective = Callable[[SparseLogits, SparseLogits], Tensor]  # a loss per token
OFF_POLICY = (
    "Completions are sampled at another temperature than the loss's, or with top_p below 1, so the "
    "loss is not computed for the distribution that they come from: leave out sampling_temperature "
    "and top_p to be on-policy."
)


def build_loss(config: DistillationConfig) -> Callable[..., DistillationOutput]:
    """Return distillation_loss with the config's objective and support; it computes entropies."""
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
        other = partial(forward_kl, tail=config.tail)
        mixture = config.forward_kl_coef, config.forward_kl_min_entropy
        objective = partial(add_where_uncertain, objective, other, *mixture)
    if config.max_token_loss is not None:
        objective = partial(clamp, objective, config.max_token_loss)
    # For "sampled", each step passes its own support.
    support = "student" if config.support == "sampled" else config.support
    loss = partial(distillation_loss, k=config.k, support=support, missing=config.missing)
    loss = partial(loss, objective=objective, entropy=True)
    if config.objective in objectives:
        return loss
    expected = f"objective: expected a loss per token of (student, teacher) from {config.objective}"
    return convert_errors(expected, RunStoppedError)(loss)


def add_where_uncertain(
    objective: Objective,
    other: Objective,
    coefficient: float,
    min_entropy: float,
    student: SparseLogits,
    teacher: SparseLogits,
) -> Tensor:
    """Return objective + coefficient * other where the teacher's entropy exceeds min_entropy nats.

    Where the teacher has several answers, forward KL keeps the student from choosing one.
    """
    assert teacher.entropy is not None
    added = torch.where(teacher.entropy > min_entropy, other(student, teacher), 0.0)
    return objective(student, teacher) + coefficient * added


def clamp(
    objective: Objective, maximum: float, student: SparseLogits, teacher: SparseLogits
) -> Tensor:
    """Return the objective, at most `maximum` nats per token; above it there is no gradient."""
    return objective(student, teacher).clamp_max(maximum)

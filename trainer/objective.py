"""From the recipe's keys to the loss."""

from collections.abc import Callable
from functools import partial

from opd_kernels import DistillationOutput, distillation_loss, forward_kl, jsd, reverse_kl
from trainer.config import DistillationConfig

DRIFT = (
    "The support holds less than 95 % of the student's mass and the rest is dropped, so the loss "
    "can fall while mass drifts off it: use tail: bucket, support: full, a larger k or a lower "
    "temperature."
)


def build_loss(config: DistillationConfig) -> Callable[..., DistillationOutput]:
    """distillation_loss with the recipe's objective, k and support; entropies come with it."""
    objective = {
        "reverse_kl": partial(reverse_kl, stop_gradient=config.stop_gradient, tail=config.tail),
        "forward_kl": partial(forward_kl, tail=config.tail),
        "jsd": partial(jsd, beta=config.beta, tail=config.tail),
    }[config.objective]
    return partial(
        distillation_loss, objective=objective, k=config.k, support=config.support, entropy=True
    )

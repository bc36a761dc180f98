"""From the recipe's keys to distillation_loss's options."""

from functools import partial
from typing import Any

from opd_kernels import forward_kl, jsd, reverse_kl
from trainer.config import DistillationConfig


def loss_options(config: DistillationConfig) -> dict[str, Any]:
    """Keyword arguments of distillation_loss: objective, k and support."""
    objective = {
        "reverse_kl": partial(reverse_kl, stop_gradient=config.stop_gradient, tail=config.tail),
        "forward_kl": partial(forward_kl, tail=config.tail),
        "jsd": partial(jsd, beta=config.beta, tail=config.tail),
    }[config.objective]
    return {"objective": objective, "k": config.k, "support": config.support}


def drift_warning(config: DistillationConfig, student_mass: float) -> str | None:
    """What a dropped tail deserves to hear when S holds too little of the student's mass."""
    if config.tail != "drop" or config.support == "full" or student_mass >= 0.95:
        return None
    return (
        f"The support holds {student_mass:.2f} of the student's probability and the rest is dropped, "
        "so the loss can fall while mass drifts out of the support: use tail: bucket, support: full, "
        "a larger k or a lower temperature."
    )

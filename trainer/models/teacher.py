"""Teachers, and the logits of student and teacher on the same completions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from opd_kernels import LazyLogits, SparseLogits
from opd_kernels.integrations.transformers import call_with_lazy_logits, pad_completions
from opd_kernels.parallel import is_dtensor, plain
from opd_trainer.config import StageConfig
from opd_trainer.data import Limits
from opd_trainer.models.load import Model, eval_mode, limits_of, load_model, reshard
from opd_trainer.models.rollout import Completion

T = TypeVar("T")
Logits = LazyLogits | SparseLogits  # of a teacher: SparseLogits if a server returns its top-K


class Teacher(Protocol):
    """Scores the tokens of completions."""

    @property
    def limits(self) -> Limits:
        """The inputs that it can take."""

    def prepare(self, completions: list[Completion]) -> None:
        """Announce all completions of a step; a teacher may score them before `logits`."""
        return

    def logits(self, completions: list[Completion], temperature: float) -> Logits:
        """Return the detached logits of all completion tokens [N], in their order."""


@dataclass(frozen=True)
class LocalTeacher(Teacher):
    """A separate model, the student itself, or the student's base below its LoRA adapters."""

    model: Model
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def limits(self) -> Limits:
        return limits_of(self.model)

    @contextmanager
    def active(self) -> Iterator[Model]:
        """Turn dropout off, and the adapters of a student's base, while the teacher is used."""
        with eval_mode(self.model), self.without_adapters():
            yield self.model

    @torch.no_grad()
    def logits(self, completions: list[Completion], temperature: float) -> LazyLogits:
        """See Teacher."""
        with self.active() as model:
            detach = LazyLogits.detach
            return on_completions(model, completions, temperature, detach, as_teacher=True)

    @torch.no_grad()
    def follow(self, student: Model, rate: float) -> None:
        """Move the weights towards the student's by this rate."""
        reshard(self.model)
        for weight, target in zip(self.model.parameters(), student.parameters(), strict=True):
            # FSDP may have split only the student.
            target = target if is_dtensor(weight) else plain(target, whole=True)
            weight.lerp_(target.to(weight.dtype), rate)


def self_teacher(
    config: StageConfig, student: Model, dtype: str | None = None, update_rate: float = 0.0
) -> LocalTeacher:
    """Return the student itself, its base below adapters, or a copy of its initial weights.

    The copy is loaded from the config's model, so that it is the same when a run resumes.
    """
    if update_rate == 1:
        return LocalTeacher(student)
    if config.lora_r > 0:
        return LocalTeacher(student, student.disable_adapter)
    return load_teacher(config.model, dtype or config.dtype, config)


def load_teacher(name: str, dtype: str, config: StageConfig) -> LocalTeacher:
    """Return a separate frozen model, split or placed as the config says."""
    split = config.distributed_config
    model = load_model(name, dtype, split, config.trust_remote_code).requires_grad_(False)
    return LocalTeacher(model if split else model.to(config.device))


def on_completions(
    model: Model,
    completions: list[Completion],
    temperature: float,
    function: Callable[[LazyLogits], T],
    as_teacher: bool = False,
    router_weight: Tensor | None = None,
) -> T:
    """Return function(logits) of all completion tokens, hidden [N, D], each after its prompt.

    With a router_weight, add the loss of the router of a mixture of experts, times this weight.

    The function runs inside the model's forward pass, so that wrappers such as DDP see the whole
    loss. The tokens are in the order of the completions, without prompts and padding.
    """
    prompts = [c.prompt.teacher_ids if as_teacher else c.prompt.student_ids for c in completions]
    device = next(model.parameters()).device
    ids, mask, is_completion = pad_completions(prompts, [c.ids for c in completions], device)

    def result(logits: LazyLogits, router_loss: Tensor | float = 0.0) -> T:
        value: Any = function(logits[is_completion])
        return value if router_weight is None else value + router_weight * router_loss

    options: dict[str, Any] = {"with_router_loss": router_weight is not None}
    return call_with_lazy_logits(model, result, ids, mask, temperature=temperature, **options)


def log_probs(model: Model, completions: list[Completion], temperature: float) -> Tensor:
    """Return the log-probs [N] of the completions' tokens."""
    ids = token_ids(completions, next(model.parameters()).device)
    return on_completions(model, completions, temperature, lambda x: x.log_prob(ids))


def token_ids(completions: list[Completion], device: torch.device) -> Tensor:
    """Return the tokens [N] of the completions, in the order of `on_completions`."""
    return torch.tensor([token for c in completions for token in c.ids], device=device)

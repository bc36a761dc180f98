"""Teachers, and student and teacher side by side on the same completions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from opd_kernels import LazyLogits, SparseLogits
from opd_kernels.integrations.transformers import call_with_lazy_logits, pad_completions
from opd_kernels.parallel import is_dtensor, plain
from trainer.config import StageConfig
from trainer.data import Limits
from trainer.models.load import Model, eval_mode, limits_of, load_model, reshard
from trainer.models.rollout import Completion

T = TypeVar("T")


class Teacher(Protocol):
    """Scores the tokens of completions."""

    @property
    def limits(self) -> Limits:
        """Of its inputs."""

    def prepare(self, completions: list[Completion]) -> None:
        """Begin with the completions of a step, whose logits are about to be asked for."""

    def logits(
        self, completions: list[Completion], temperature: float
    ) -> LazyLogits | SparseLogits:
        """Of every completion token [N], in order, detached."""


@dataclass(frozen=True)
class LocalTeacher:
    """A model of its own, the student as it is, or the base weights below its LoRA adapters."""

    model: Model
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def limits(self) -> Limits:
        return limits_of(self.model)

    @contextmanager
    def active(self) -> Iterator[Model]:
        """The model as the teacher: no dropout, and no adapters where it is the student's base."""
        with eval_mode(self.model), self.without_adapters():
            yield self.model

    def prepare(self, completions: list[Completion]) -> None:
        """Nothing to begin with."""

    @torch.no_grad()
    def logits(self, completions: list[Completion], temperature: float) -> LazyLogits:
        """See Teacher."""
        contexts = [c.prompt.teacher_ids for c in completions]
        with self.active() as model:
            return on_completions(
                model, contexts, completions, temperature, lambda logits: logits.detach()
            )

    @torch.no_grad()
    def follow(self, student: Model, rate: float) -> None:
        """Go this part of the way to the student's weights."""
        reshard(self.model)
        for own, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            # FSDP may have split the student alone.
            theirs = theirs if is_dtensor(own) else plain(theirs, whole=True)
            own.lerp_(theirs.to(own.dtype), rate)


def self_teacher(
    config: StageConfig, student: Model, dtype: str | None = None, update_rate: float = 0.0
) -> LocalTeacher:
    """The student as it is, its base below adapters, or a copy of its initial weights.

    The copy begins with the initial weights even when a run resumes.
    """
    if update_rate == 1:
        return LocalTeacher(student)
    if config.lora_r > 0:
        return LocalTeacher(student, student.disable_adapter)
    return load_teacher(config.model, dtype or config.dtype, config)


def load_teacher(name: str, dtype: str, config: StageConfig) -> LocalTeacher:
    """A frozen model of its own, where the recipe has its models."""
    split = config.distributed_config
    model = load_model(name, dtype, split, config.trust_remote_code).requires_grad_(False)
    return LocalTeacher(model if split else model.to(config.device))


def on_completions(
    model: Model,
    contexts: list[list[int]],
    completions: list[Completion],
    temperature: float,
    function: Callable[[LazyLogits], T],
) -> T:
    """function(logits) of every completion token, hidden [N, D], behind its context.

    It runs inside the model's forward, where wrappers such as DDP see the whole loss. The tokens
    come in the order of the completions; contexts and padding are left out.
    """
    device = next(model.parameters()).device
    *batch, tokens = pad_completions(contexts, [c.ids for c in completions], device)
    call = partial(call_with_lazy_logits, model, temperature=temperature)
    return call(lambda logits: function(logits[tokens]), *batch)


def on_students(
    model: Model,
    completions: list[Completion],
    temperature: float,
    function: Callable[[LazyLogits], T],
) -> T:
    """`on_completions` behind the student's prompts."""
    contexts = [c.prompt.student_ids for c in completions]
    return on_completions(model, contexts, completions, temperature, function)


def token_ids(completions: list[Completion], device: torch.device) -> torch.Tensor:
    """[N] the completions' tokens, whose logits `on_completions` has."""
    return torch.tensor([token for c in completions for token in c.ids], device=device)


def side_by_side(
    student: Model,
    teacher: Teacher,
    completions: list[Completion],
    temperature: float,
    function: Callable[[LazyLogits, LazyLogits | SparseLogits], T],
) -> T:
    """function(student, teacher) on the logits of every completion token, see `on_completions`."""
    scored = teacher.logits(completions, temperature)
    return on_students(student, completions, temperature, lambda logits: function(logits, scored))

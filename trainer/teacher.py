"""Teachers, and student and teacher side by side on the same completions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from opd_kernels import LazyLogits
from opd_kernels.integrations.transformers import call_with_lazy_logits, pad_completions
from trainer.config import DistillationConfig
from trainer.models import Model, eval_mode, load_model
from trainer.rollout import Completion

T = TypeVar("T")


@dataclass(frozen=True)
class Teacher:
    """A model of its own, the student as it is, or the base weights below its LoRA adapters."""

    model: Model
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext
    update_rate: float = 0.0  # of a model of its own that follows the student

    @contextmanager
    def active(self) -> Iterator[Model]:
        """The model as the teacher: no dropout, and no adapters where it is the student's base."""
        with eval_mode(self.model), self.without_adapters():
            yield self.model

    @torch.no_grad()
    def follow(self, student: Model) -> None:
        """After a step: move towards the student's weights, if this teacher does."""
        if self.update_rate > 0:
            pairs = zip(self.model.parameters(), student.parameters(), strict=True)
            for own, theirs in pairs:
                own.lerp_(theirs.to(own.dtype), self.update_rate)


def load_teacher(config: DistillationConfig, student: Model) -> Teacher:
    """The recipe's teacher; "self" begins with the initial weights, even when a run resumes."""
    if config.teacher_update_rate == 1:
        return Teacher(student)
    if config.teacher == "self" and config.lora_r > 0:
        return Teacher(student, student.disable_adapter)
    name = config.model if config.teacher == "self" else config.teacher
    model = load_model(name, config.teacher_dtype or config.dtype).requires_grad_(False)
    return Teacher(model, update_rate=config.teacher_update_rate)


def side_by_side(
    student: Model,
    teacher: Teacher,
    completions: list[Completion],
    temperature: float,
    function: Callable[[LazyLogits, LazyLogits], T],
) -> T:
    """function(student, teacher) on the logits of every completion token, both hidden [N, D].

    It runs inside the student's forward, where wrappers such as DDP see the whole loss. The tokens
    come in the order of the completions; prompts and padding are left out.
    """
    device = next(student.parameters()).device
    ids, prompts = [c.ids for c in completions], [c.prompt for c in completions]
    *ours, our_tokens = pad_completions([p.student_ids for p in prompts], ids, device)
    *theirs, their_tokens = pad_completions([p.teacher_ids for p in prompts], ids, device)
    call = partial(call_with_lazy_logits, temperature=temperature)
    with torch.no_grad(), teacher.active() as model:
        scored = call(model, lambda x: x[their_tokens].detach(), *theirs)
    return call(student, lambda x: function(x[our_tokens], scored), *ours)

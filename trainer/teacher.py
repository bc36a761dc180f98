"""Teachers, and student and teacher side by side on the same completions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from opd_kernels import LazyLogits
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.models import load_model
from trainer.rollout import Completion

T = TypeVar("T")


class Teacher:
    """A frozen model, or the base weights below the student's LoRA adapters."""

    def __init__(self, model: nn.Module, shares_weights: bool) -> None:
        self.model = model
        self.shares_weights = shares_weights
        if not shares_weights:
            model.requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model as the teacher: no dropout, and no adapters where it is the student's base."""
        was_training = self.model.training
        self.model.eval()
        with self.model.disable_adapter() if self.shares_weights else nullcontext():
            yield self.model
        self.model.train(was_training)


def load_teacher(config: DistillationConfig, student: nn.Module) -> Teacher:
    """The recipe's teacher; "self" is the initial weights, even when a run resumes."""
    if config.teacher == "self" and config.lora_r > 0:
        return Teacher(student, shares_weights=True)
    name = config.model if config.teacher == "self" else config.teacher
    return Teacher(load_model(name, config.teacher_dtype or config.dtype), shares_weights=False)


def side_by_side(
    student: nn.Module,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    temperature: float,
    function: Callable[[LazyLogits, LazyLogits], T],
) -> T:
    """function(student, teacher) on the logits of every completion token, both hidden [N, D].

    It runs inside the student's forward, where wrappers such as DDP see the whole loss. The tokens
    come in the order of the completions; prompts and padding are left out.
    """
    device = next(student.parameters()).device
    ours = _join([p.student_ids for p in prompts], completions, device)
    theirs = _join([p.teacher_ids for p in prompts], completions, device)
    with torch.no_grad(), teacher.active() as model:
        logits = lazy_logits(model, *theirs[:2], temperature=temperature)
    scored = logits[theirs[2]].detach()
    return call_with_lazy_logits(
        student,
        lambda logits: function(logits[ours[2]], scored),
        *ours[:2],
        temperature=temperature,
    )


def _join(
    prompts: Sequence[list[int]], completions: Sequence[Completion], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and which positions predict a completion token, each [B, T].

    Padded on the right, so that positions start at 0, with id 0: the masks come from lengths.
    """
    rows = [torch.tensor([*p, *c.ids]) for p, c in zip(prompts, completions, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    start = torch.tensor([len(p) for p in prompts])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(ids.shape[1])
    predicts = (position >= start - 1) & (position < end - 1)
    return ids.to(device), (position < end).long().to(device), predicts.to(device)

"""The heads to measure, and inputs whose softmax is as peaked as a real model's."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opd_kernels import LazyLogits

# Hidden size D and vocabulary size V of real heads.
HEADS = {
    "SmolLM2-135M": (576, 49_152),
    "Llama-3.2-1B": (2_048, 128_256),
    "Qwen3-0.6B": (1_024, 151_936),
    "Gemma-3-1B": (1_152, 262_144),
}

# On its own samples at temperature 1, SmolLM2-135M gives on average 275 tokens a probability of at
# least 2^-14 (python -m benchmarks filter).
_LIKELY_TOKENS, _LIKELY = 275, 2.0**-14


@functools.cache
def logits_std(vocab: int) -> float:
    """Return the standard deviation at which normal logits are as peaked as SmolLM2's.

    It is found by bisection: a larger standard deviation leaves fewer likely tokens.
    """
    normal = torch.randn(16, vocab, generator=torch.Generator().manual_seed(0))
    low, high = 3.0, 12.0
    for _ in range(12):
        middle = (low + high) / 2
        likely = ((middle * normal).softmax(-1) >= _LIKELY).sum(-1).double().mean()
        low, high = (middle, high) if likely > _LIKELY_TOKENS else (low, middle)
    return middle


@dataclass(frozen=True)
class Problem:
    """A student with trainable hidden states and weight, and a frozen teacher of the same shape."""

    tokens: int
    dim: int
    vocab: int
    k: int = 20
    dtype: str = "float32"
    device: str = "cpu"

    def tensors(self) -> dict[str, Tensor]:
        """Return hidden [N, D] and weight [V, D] of both models, and labels [N].

        The teacher's logits are correlated with the student's.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.dim, generator=generator)

        std = logits_std(self.vocab)
        hidden, weight = std * normal(self.tokens), normal(self.vocab)
        weight *= self.dim**-0.5
        tensors = {
            "hidden": hidden,
            "weight": weight,
            "teacher_hidden": hidden + 0.2 * std * normal(self.tokens),
            "teacher_weight": weight + 0.1 * self.dim**-0.5 * normal(self.vocab),
        }
        tensors = {name: t.to(getattr(torch, self.dtype)) for name, t in tensors.items()}
        tensors["labels"] = torch.randint(self.vocab, (self.tokens,), generator=generator)
        return tensors


@dataclass
class Inputs:
    """The tensors of a problem, ready for a forward and backward pass."""

    problem: Problem
    student: LazyLogits  # hidden and weight are leaves
    teacher: LazyLogits
    labels: Tensor  # [N]

    @classmethod
    def make(cls, problem: Problem) -> "Inputs":
        """Return new inputs of a problem."""
        return cls._on_device(problem, problem.tensors())

    @classmethod
    def load(cls, problem: Problem, path: Path) -> "Inputs":
        """Return the inputs saved at path, memory-mapped so that CPU processes share them."""
        tensors = torch.load(path, mmap=True, weights_only=True)
        for tensor in tensors.values():
            tensor.sum()  # reads every page now, so that no measurement includes the page faults
        return cls._on_device(problem, tensors)

    @classmethod
    def _on_device(cls, problem: Problem, tensors: dict[str, Tensor]) -> "Inputs":
        tensors = {name: tensor.to(problem.device) for name, tensor in tensors.items()}
        student = LazyLogits(tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_())
        teacher = LazyLogits(tensors["teacher_hidden"], tensors["teacher_weight"])
        return cls(problem, student, teacher, tensors["labels"])

    def clear(self) -> None:
        """Drop the gradients of the last pass."""
        self.student.hidden.grad = self.student.weight.grad = None

"""What a step logs beside its loss: sums over tokens that add up across micro-batches and ranks."""

from collections import Counter

import torch

from opd_kernels import DistillationOutput, LazyLogits
from trainer.rollout import Completion


def completion_sums(completions: list[Completion]) -> Counter[str]:
    """Counts of completions, of their tokens, and of those that were truncated."""
    return Counter(
        completions=len(completions),
        tokens=sum(len(c.ids) for c in completions),
        truncated=sum(c.truncated for c in completions),
    )


@torch.no_grad()
def token_sums(output: DistillationOutput, teacher: LazyLogits, k: int) -> Counter[str]:
    """Sums over tokens: both models' mass on S, overlap of their top-K, and entropies in nats.

    The overlap needs the teacher's own top-K: one more product with its head.
    """
    s, t = output.student, output.teacher
    assert s.entropy is not None
    assert t.entropy is not None
    return Counter(
        student_mass=float(s.mass.sum()),
        teacher_mass=float(t.mass.sum()),
        overlap=float(s.overlap(teacher.topk(min(k, t.vocab_size))).sum()),
        student_entropy=float(s.entropy.sum()),
        teacher_entropy=float(t.entropy.sum()),
    )


def means(sums: dict[str, float]) -> dict[str, float]:
    """Per token, and per completion where that is the unit."""
    per_completion = {
        "completion_length": sums["tokens"] / sums["completions"],
        "truncated": sums["truncated"] / sums["completions"],
    }
    units = ("tokens", "completions", "truncated")
    return {n: x / sums["tokens"] for n, x in sums.items() if n not in units} | per_completion

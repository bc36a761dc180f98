"""What a step logs beside its loss: sums over tokens that add up across micro-batches and ranks."""

from collections import Counter
from collections.abc import Mapping

import torch

from opd_kernels import DistillationOutput, LazyLogits
from trainer.rollout import Completion


def completion_sums(completions: list[Completion]) -> Counter[str]:
    """Counts of tokens, completions, and completions that were truncated."""
    truncated = sum(c.truncated for c in completions)
    tokens = sum(len(c.ids) for c in completions)
    return Counter(tokens=tokens, completions=len(completions), truncated=truncated)


@torch.no_grad()
def token_sums(output: DistillationOutput, teacher: LazyLogits, k: int) -> dict[str, float]:
    """Sums over tokens: both models' mass on S, overlap of their top-K, entropies in nats."""
    s, t = output.student, output.teacher
    figures = {"student_mass": s.mass, "teacher_mass": t.mass}
    figures["overlap"] = s.overlap(teacher.topk(min(k, t.vocab_size)))
    if s.entropy is not None and t.entropy is not None:
        figures |= {"student_entropy": s.entropy, "teacher_entropy": t.entropy}
    return {name: float(figure.sum()) for name, figure in figures.items()}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per token, and per completion where that is the unit."""
    counts = tokens, completions, truncated = "tokens", "completions", "truncated"
    figures = {name: x / sums[tokens] for name, x in sums.items() if name not in counts}
    figures["completion_length"] = sums[tokens] / sums[completions]
    return figures | {truncated: sums[truncated] / sums[completions]}

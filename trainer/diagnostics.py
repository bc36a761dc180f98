"""What a step logs beside its loss: sums over tokens that add up across micro-batches and ranks."""

import torch

from opd_kernels import LazyLogits, SparseLogits
from trainer.rollout import Completion


class Sums(dict[str, float]):
    """Totals by name; a name that was never added is 0."""

    COUNTS = ("tokens", "scored_tokens", "completions", "truncated", "seconds", "skipped_steps")
    FIGURES = ("student_mass", "teacher_mass", "overlap", "student_entropy", "teacher_entropy")
    NAMES = COUNTS + FIGURES  # what every rank has

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, **values: float) -> None:
        """Add to the totals."""
        self.update({name: self[name] + value for name, value in values.items()})

    def add_completions(self, completions: list[Completion]) -> None:
        """Add the tokens, completions, and completions that were truncated."""
        for completion in completions:
            self.add(tokens=len(completion.ids), completions=1, truncated=completion.truncated)

    @torch.no_grad()
    def add_tokens(
        self, s: SparseLogits, t: SparseLogits, student_top: SparseLogits, teacher: LazyLogits
    ) -> None:
        """Add both models' mass on S, the overlap of their top-K, and entropies in nats."""
        overlap = student_top.overlap(teacher.topk(student_top.ids.shape[-1]))
        figures = {"student_mass": s.mass, "teacher_mass": t.mass, "overlap": overlap}
        if s.entropy is not None and t.entropy is not None:
            figures |= {"student_entropy": s.entropy, "teacher_entropy": t.entropy}
        self.add(scored_tokens=s.ids.shape[0])
        self.add(**{name: float(figure.sum()) for name, figure in figures.items()})

    def means(self) -> dict[str, float]:
        """Per token, and per completion where that is the unit."""
        scored = max(1.0, self["scored_tokens"])
        figures = {name: x / scored for name, x in self.items() if name not in self.COUNTS}
        figures["completion_length"] = self["tokens"] / self["completions"]
        return figures | {"truncated": self["truncated"] / self["completions"]}

"""What a step logs beside its loss: sums over tokens that add up across micro-batches and ranks."""

import torch

from opd_kernels import DistillationOutput, LazyLogits, SparseLogits
from trainer.rollout import Completion


class Sums(dict[str, float]):
    """Totals by name; a name that was never added is 0."""

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
        self, output: DistillationOutput, student_top: SparseLogits, teacher: LazyLogits
    ) -> None:
        """Add both models' mass on S, the overlap of their top-K, and entropies in nats."""
        s, t = output.student, output.teacher
        overlap = student_top.overlap(teacher.topk(student_top.ids.shape[-1]))
        figures = {"student_mass": s.mass, "teacher_mass": t.mass, "overlap": overlap}
        if s.entropy is not None and t.entropy is not None:
            figures |= {"student_entropy": s.entropy, "teacher_entropy": t.entropy}
        self.add(**{name: float(figure.sum()) for name, figure in figures.items()})

    def means(self) -> dict[str, float]:
        """Per token, and per completion where that is the unit."""
        counts = ("tokens", "completions", "truncated", "seconds", "skipped_steps")
        figures = {name: x / self["tokens"] for name, x in self.items() if name not in counts}
        figures["completion_length"] = self["tokens"] / self["completions"]
        return figures | {"truncated": self["truncated"] / self["completions"]}

"""Metrics beside a step's loss, alarms when they show a known failure, and privileged contexts."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opd_kernels import LazyLogits, SparseLogits, reverse_kl
from opd_trainer.config import DistillationConfig, RLVRConfig, StageConfig
from opd_trainer.models.rollout import Completion
from opd_trainer.models.teacher import LocalTeacher, Logits

POSITIONS = (0, 16, 64, 256, 1024)  # where ranges of positions in a completion begin
BY_POSITION = ("scored_tokens", "teacher_nll", "teacher_entropy", "overlap")
WINDOW = 5  # log lines
# Nats per token. In float32 engine and student differ by 1e-5, in bfloat16 by 0.04; weights of the
# step before differ by 0.2 to 0.6.
MAX_ENGINE_DIFFERENCE = 0.1
DRIFT = (
    "The support holds less than 95 % of the student's mass and the rest is dropped, so the loss "
    "can fall while mass drifts off it: use tail: bucket, support: full, a larger k or a lower "
    "temperature."
)


class Sums(dict[str, float]):
    """Totals by name, which add up over micro-batches and ranks; a missing name is 0."""

    COUNTS = (
        "tokens", "scored_tokens", "compared_tokens", "completions", "seconds", "skipped_steps",
    )  # fmt: skip
    MAXIMA = ("log_prob_difference_max",)  # of all micro-batches and ranks, not their sum
    PER_COMPLETION = ("truncated", "repetition", "reward", "informative")

    def __missing__(self, name: str) -> float:
        return 0.0

    def add(self, **values: float) -> None:
        """Add numbers to the totals, or raise a maximum to them."""
        for name, value in values.items():
            self[name] = max(self[name], value) if name in self.MAXIMA else self[name] + value

    def add_tensors(self, **values: Tensor) -> None:
        """Add the sum of each tensor to the totals."""
        totals = torch.stack([x.sum().double() for x in values.values()])
        self.add(**dict(zip(values, totals.tolist(), strict=True)))

    def add_engine(self, difference: Tensor) -> None:
        """Add distances [N] between the log-probs of a rollout engine and of the student."""
        self.add_tensors(
            log_prob_difference=difference, compared_tokens=torch.ones_like(difference)
        )
        self.add(log_prob_difference_max=float(difference.max()))

    def add_completions(self, completions: list[Completion]) -> None:
        """Add the metrics of each completion: length, truncation, repetition, and reward if any."""
        for c in completions:
            self.add(tokens=len(c.ids), completions=1, truncated=c.truncated)
            self.add(repetition=repetition(c.ids))
            if c.advantage is not None:
                self.add(reward=c.reward, informative=c.advantage != 0)

    @torch.no_grad()
    def add_tokens(self, s: SparseLogits, t: SparseLogits) -> None:
        """Add both models' mass on S, the reverse KL with the rest of the vocabulary as one bucket,
        and two norms on S, per token: of the gradient of reverse KL with stop-gradient, p (c - m),
        and of the term that is added without it, p (1 - P).
        """
        p = s.log_probs.exp()
        shared = (s.log_probs > -torch.inf) & (t.log_probs > -torch.inf)
        c = torch.where(shared, s.log_probs - t.log_probs, 0.0)
        gradient = torch.where(shared, p * (c - (p * c).sum(-1, keepdim=True)), 0.0)
        kl = reverse_kl(s, t, tail="bucket")
        self.add_tensors(
            # A server may leave out an id, whose term would be infinite.
            reverse_kl=torch.where(kl.isfinite(), kl, 0.0),
            student_mass=s.mass,
            teacher_mass=t.mass,
            gradient_norm_on_s=gradient.norm(dim=-1),
            bias_norm=(1 - s.mass) * p.norm(dim=-1),
        )

    @torch.no_grad()
    def add_positions(
        self, student_top: SparseLogits, teacher: Logits, ids: Tensor, lengths: list[int]
    ) -> None:
        """Add the teacher's negative log-likelihood of the sampled ids [N], its entropy (both in
        nats) and the overlap of both top-K, over all tokens and by position.
        """
        k = student_top.ids.shape[-1]
        if isinstance(teacher, LazyLogits):
            top = teacher.topk(k, entropy=True)
            nll = top.lse - teacher.gather(ids[:, None], tail=False).values[:, 0]
        else:  # a server returns its top-K and the sampled token
            top, nll = teacher.topk(k), -teacher.at(ids[:, None]).log_probs[:, 0]
        metrics = {
            "scored_tokens": torch.ones_like(nll),
            "overlap": student_top.overlap(top),
            "outside_teacher_top_k": (top.ids != ids[:, None]).all(-1).float(),
            "teacher_nll": torch.where(nll < torch.inf, nll, 0.0),  # inf: the server left it out
        }
        if top.entropy is not None:
            metrics["teacher_entropy"] = top.entropy
        if student_top.entropy is not None:
            metrics["student_entropy"] = student_top.entropy
        self.add_tensors(**metrics)
        shown = {name: x for name, x in metrics.items() if name in BY_POSITION}
        position = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
        for first, last in zip(POSITIONS, [*POSITIONS[1:], sys.maxsize], strict=True):
            inside = (position >= first) & (position < last)
            self.add_tensors(**{f"{name}_from_{first}": x * inside for name, x in shown.items()})

    def means(self) -> dict[str, float]:
        """Return means per token or per completion; leave out metrics that no token has."""
        completions = max(1.0, self["completions"])
        means = {"completion_length": self["tokens"] / completions}
        for name, total in self.items():
            if name in self.MAXIMA:
                means[name] = total
            elif name in self.PER_COMPLETION:
                means[name] = total / completions
            elif name == "log_prob_difference":
                means[name] = total / self["compared_tokens"]
            elif name not in self.COUNTS and not name.startswith("scored_tokens"):
                _, is_range, first = name.rpartition("_from_")
                tokens = self[f"scored_tokens_from_{first}" if is_range else "scored_tokens"]
                if tokens > 0:
                    means[name] = total / tokens
        if gradient := means.pop("gradient_norm_on_s", 0.0):
            means["bias_ratio"] = means.pop("bias_norm") / gradient
        return means


def alarms(config: StageConfig, lines: list[dict[str, Any]], ends: bool = False) -> str:
    """Return a line for each failure that the last step shows and the steps before it do not.

    A failure that comes back within WINDOW steps is not reported again.

    Args:
        lines: all log lines.
        ends: whether the last line is that of the last step.
    """
    steps = [line for line in lines if "loss" in line]
    shown = [*_idle(config, steps, ends), *_failures(config, steps)]
    if not shown:
        return ""
    recent = (steps[:n] for n in range(max(1, len(steps) - WINDOW), len(steps)))
    before = (x for part in recent for x in (*_idle(config, part, False), *_failures(config, part)))
    raised = {_title(x) for x in before}
    return "\n".join(x for x in shown if _title(x) not in raised)


def _title(message: str) -> str:
    return message.partition(":")[0]


def _idle(config: StageConfig, lines: list[dict[str, Any]], ends: bool) -> Iterator[str]:
    """Yield messages for steps that teach the student nothing, since the start or several times."""
    recent, is_rlvr = lines[-WINDOW:], isinstance(config, RLVRConfig)
    if config.scorer and config.eval_data is None and not is_rlvr:
        yield "Scorer: it scores held-out completions, but there are none: set eval_data."
    if config.skip_truncated and all(line.get("truncated") == 1 for line in recent):
        yield (
            "Skipped: every completion reached max_completion_length, and skip_truncated leaves it "
            "out, so nothing is learned: raise max_completion_length."
        )
    elif is_rlvr and not any(line.get("informative", 1) for line in recent):
        yield (
            "Rewards: all completions of each prompt had the same reward, so no reward is learned: "
            "check scorer and answer_pattern, choose prompts that the student solves sometimes, or "
            "raise completions_per_prompt."
        )
    elif not any(line.get("grad_norm", 1) or line["skipped_steps"] for line in recent):
        yield (
            "No gradient: it was 0, so nothing is learned: check that teacher and student differ, "
            "and max_token_loss."
        )
    if ends and not any(line.get("learning_rate", 1) for line in lines):
        yield (
            "Learning rate: it was 0 in every step, so the student has not changed: lower "
            "warmup_steps, or raise max_steps."
        )


def _failures(config: StageConfig, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield messages; trends compare the first lines with the last."""
    now = lines[-1]
    if now["skipped_steps"] and not config.fp16:  # the scaler of fp16 skips steps to find its scale
        yield (
            "Not finite: a step was left out because its gradient had NaN or inf: see grad_norm "
            "before it, and lower learning_rate or max_grad_norm."
        )
    difference = now.get("log_prob_difference", 0.0)
    if difference > MAX_ENGINE_DIFFERENCE:
        yield (
            "Engine: its log-probs of the samples differ from the student's by "
            f"{difference:.2g} nats on average and {now['log_prob_difference_max']:.2g} at most, "
            "so it samples from other weights or rounds them: check rollout_engine and dtype, or "
            "set max_importance_weight."
        )
    drops = isinstance(config, DistillationConfig) and config.drops_mass
    if drops and now.get("student_mass", 1.0) < 0.95:
        yield DRIFT
    if len(lines) < 2 * WINDOW:
        return

    def trend(name: str) -> tuple[float, float]:
        values = [line[name] for line in lines if name in line] or [0.0]
        return fmean(values[:WINDOW]), fmean(values[-WINDOW:])

    start, end = trend("repetition")
    if end > start + 0.2:
        yield (
            f"Repetition: {end:.0%} of 3-grams occurred before, after {start:.0%} at the start, as "
            "in a collapse: lower learning_rate, and check that nothing biases the gradient."
        )
    start, end = trend("truncated")
    if end > start + 0.3:
        yield (
            f"Truncated: {end:.0%} of completions do not end, after {start:.0%} at the start: set "
            "skip_truncated, lower learning_rate, or raise max_completion_length."
        )
    start, end = trend("student_mass")
    if isinstance(config, DistillationConfig) and not config.stop_gradient and end < start - 0.1:
        yield (
            "Biased gradient: without stop-gradient the support's share of the student's mass fell "
            f"from {start:.2f} to {end:.2f}, as it does before a collapse: set stop_gradient: true "
            "or tail: bucket."
        )
    _, outside = trend("outside_teacher_top_k")
    if outside > 0.3:
        yield (
            f"Mismatch: {outside:.0%} of the student's tokens are outside the teacher's top-K, so "
            "it scores prefixes that it would not write: run the sft stage on its completions "
            "first, or use a teacher closer to the student."
        )


def repetition(ids: list[int]) -> float:
    """Return the share of a completion's 3-grams that occurred in it before."""
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


@torch.no_grad()
def across_contexts(
    teacher: LocalTeacher, completions: list[Completion], k: int, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Compare a teacher with itself under the several privileged contexts of a prompt:
    self-distillation can keep only what they share.

    Returns:
        `spread` of the tokens [N] of one completion, for each prompt that has several contexts. The
        distributions are over the union of the contexts' top-K with one bucket for the rest, which
        makes both numbers lower bounds.
    """
    spreads, groups = [], defaultdict(list)
    for c in completions:
        groups[tuple(c.prompt.student_ids)].append(c)
    for group in groups.values():
        prompts = list({tuple(c.prompt.teacher_ids): c.prompt for c in group}.values())
        if len(prompts) > 1:
            copies = [replace(group[0], prompt=p) for p in prompts]
            logits = teacher.logits(copies, temperature)
            ids = logits.topk(k).ids.unflatten(0, (len(copies), -1))  # [contexts, N, K]
            union = ids.transpose(0, 1).flatten(1).repeat(len(copies), 1)
            on_union = logits.gather(union)
            rows = torch.cat([on_union.log_probs, on_union.log_tail[:, None]], dim=-1)
            spreads.append(spread(rows.unflatten(0, (len(copies), -1))))
    return spreads


def spread(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return two distances, each [N] in nats, of M distributions [M, N, K].

    The first is their mean KL to their average. The second is -log Z of their geometric mean: the
    reverse KL that remains for a student that cannot see which of the contexts it has.
    """
    average = log_probs.exp().mean(0).log()
    live = log_probs > -torch.inf
    kl = torch.where(live, log_probs.exp() * (log_probs - average), 0.0).sum(-1)
    return kl.mean(0), -log_probs.mean(0).logsumexp(-1)

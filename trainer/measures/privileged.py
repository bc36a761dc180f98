"""What a privileged context changes: self-distillation can only keep what its teachers share."""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from trainer.models.rollout import Completion
from trainer.models.teacher import LocalTeacher


@torch.no_grad()
def across_contexts(
    teacher: LocalTeacher, completions: list[Completion], k: int, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """How far a teacher is from itself under the several contexts that prompts have.

    Returns:
        For each prompt that has several, of the tokens [N] of a completion under one of them: the
        mean KL to their average, and -log Z of their geometric mean, which is the reverse KL that
        is left to a student who cannot see which context it is. Both in nats, of the union of their
        top-K with one bucket for the rest, which makes them lower bounds.
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
    """Of distributions [M, N, K]: their mean KL to their average, and -log Z of the geometric mean,
    each [N].
    """
    average = log_probs.exp().mean(0).log()
    live = log_probs > -torch.inf
    kl = torch.where(live, log_probs.exp() * (log_probs - average), 0.0).sum(-1)
    return kl.mean(0), -log_probs.mean(0).logsumexp(-1)

"""The effect of privileged contexts: self-distillation can keep only what its teachers share."""

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
    """Compare a teacher with itself under the several contexts of a prompt.

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

"""Reinforcement learning from verifiable rewards: GRPO's group-relative policy gradient.

The loss of a token with advantage A and ratio r = p(now) / p(when sampled) is PPO's clipped
-min(r A, clip(r, 1 - e, 1 + e) A), arXiv 1707.06347 equation 7, with A the reward's distance from
the mean of the prompt's group, arXiv 2402.03300 section 4.1.
"""

from dataclasses import replace
from operator import methodcaller

import torch
from torch import Tensor, nn

from opd_kernels import LazyLogits
from trainer.config import RLVRConfig
from trainer.data import Prompt
from trainer.measures.evaluation import Evaluation
from trainer.models.rollout import Completion
from trainer.models.teacher import LocalTeacher, on_students, token_ids
from trainer.stages.training import CompletionTrainer, Part

_LEAST_DEVIATION = 1e-4  # of rewards; below it their differences are taken for noise


class RLVRTrainer(CompletionTrainer):
    """Raises the likelihood of completions that score above the others of their prompt."""

    args: RLVRConfig

    def __init__(
        self,
        model: nn.Module,
        args: RLVRConfig,
        data: list[Prompt],
        evaluation: Evaluation,
        start: LocalTeacher | None,
    ) -> None:
        super().__init__(model, args, data, evaluation)
        self.needs_log_probs = args.steps_per_rollout > 1
        self.start = start

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """Samples with their advantages."""
        completions, score = super().complete(prompts), self.evaluation.scorer
        assert score is not None
        rewards = [score(self.sampler.text(c), c.prompt.row) for c in completions]
        groups = torch.tensor(rewards).view(-1, self.args.completions_per_prompt)
        advantages = groups - groups.mean(-1, keepdim=True)
        if self.args.scale_advantages:
            advantages /= groups.std(-1, keepdim=True).clamp_min(_LEAST_DEVIATION)
        figures = zip(completions, rewards, advantages.flatten().tolist(), strict=True)
        return [replace(c, reward=reward, advantage=advantage) for c, reward, advantage in figures]

    def parts(self, completions: list[Completion]) -> list[Part]:
        """The policy gradient, with the KL to the start."""
        return [Part(completions, self._policy_loss)]

    def _policy_loss(
        self, model: nn.Module, batch: list[Completion], weights: Tensor, denominator: Tensor
    ) -> Tensor:
        device, ids = weights.device, token_ids(batch, weights.device)
        lengths = torch.tensor([len(c.ids) for c in batch], device=device)
        advantages = torch.tensor([c.advantage for c in batch], device=device)
        advantages = advantages.repeat_interleave(lengths)
        start = None
        if self.start is not None and self.args.kl_coef > 0:
            with torch.no_grad(), self.start.active() as initial:
                of_ids = methodcaller("log_prob", ids)
                start = on_students(initial, batch, self.args.temperature, of_ids)

        def of(logits: LazyLogits) -> Tensor:
            now = logits.log_prob(ids)
            sampled = now.detach()
            if self.needs_log_probs:
                sampled = torch.tensor([x for c in batch for x in c.log_probs or []], device=device)
            loss, ratio, clipped = clipped_policy_loss(
                now, sampled, advantages, self.args.clip_ratio, self.args.clip_ratio_high
            )
            counted = (weights > 0).float()
            figures = {"ratio": ratio, "clipped": clipped}
            if start is not None:
                divergence = kl_estimate(now, start)
                loss = loss + self.args.kl_coef * divergence
                figures["kl_to_start"] = divergence
            self.sums.add(scored_tokens=float(counted.sum()))
            self.sums.add(**{n: float((x.detach() * counted).sum()) for n, x in figures.items()})
            return (loss * weights).sum() / denominator

        return on_students(model, batch, self.args.temperature, of)


def clipped_policy_loss(
    now: Tensor, sampled: Tensor, advantages: Tensor, clip: float, clip_high: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the ratio, and 1 where it is clipped, of tokens [N].

    Args:
        now: [N] log-probabilities of the sampled tokens, differentiable.
        sampled: [N] the same by the policy that sampled them.
        advantages: [N].
        clip: e below 1.
        clip_high: e above 1; None for the same.
    """
    ratio = (now - sampled).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    return loss, ratio, (ratio * advantages > bounded * advantages).to(ratio.dtype)


def kl_estimate(now: Tensor, start: Tensor) -> Tensor:
    """An estimate of the reverse KL to the start from tokens that were sampled now.

    Its value is exp(d) - 1 - d with d = log start - log now, never negative (Schulman,
    Approximating KL divergence, 2020, k3). The gradient of that is the forward KL's, so that it
    comes from -d log now, whose mean over samples is the reverse KL's.
    """
    difference = (start - now).detach()
    return difference.expm1() - difference - difference * (now - now.detach())

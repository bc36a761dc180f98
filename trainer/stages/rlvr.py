"""Reinforcement learning from verifiable rewards: GRPO's group-relative policy gradient.

The loss of a token with advantage A and ratio r = p(now) / p(engine) is PPO's clipped
-min(r A, clip(r, 1 - e, 1 + e) A), arXiv 1707.06347 equation 7. A is the distance of the reward
from the mean of the prompt's group, arXiv 2402.03300 section 4.1.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from opd_kernels import LazyLogits
from opd_trainer.config import RLVRConfig
from opd_trainer.data import Prompt
from opd_trainer.models.rollout import Completion
from opd_trainer.models.teacher import LocalTeacher, log_probs
from opd_trainer.stages.training import CompletionTrainer, MicroBatch, Part

_MIN_DEVIATION = 1e-4  # of rewards; smaller differences count as noise


class RLVRTrainer(CompletionTrainer):
    """Raises the likelihood of completions that score above the others of their prompt."""

    args: RLVRConfig
    start: LocalTeacher | None = None  # the initial weights, for the KL to them

    def complete(self, prompts: list[Prompt]) -> list[Completion]:
        """Return samples with their rewards and advantages."""
        completions = self.evaluation.scored(super().complete(prompts))
        rewards = torch.tensor([c.reward for c in completions])
        groups = rewards.view(-1, self.args.completions_per_prompt)
        advantages = groups - groups.mean(-1, keepdim=True)
        if self.args.scale_advantages:
            advantages /= groups.std(-1, keepdim=True).clamp_min(_MIN_DEVIATION)
        pairs = zip(completions, advantages.flatten().tolist(), strict=True)
        return [replace(c, advantage=advantage) for c, advantage in pairs]

    def parts(self, completions: list[Completion]) -> list[Part]:
        """Return the policy gradient, with the KL to the initial weights."""
        return [Part(completions, self._policy_loss)]

    def _policy_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        weights, temperature = batch.weights, self.args.temperature
        per_token = [c.advantage for c in batch.completions for _ in c.ids]
        advantages = torch.tensor(per_token, device=weights.device)
        start = None
        if self.start is not None:
            with torch.no_grad(), self.start.active() as initial:
                start = log_probs(initial, batch.completions, temperature)

        def loss_of(logits: LazyLogits) -> Tensor:
            now = logits.log_prob(batch.ids)
            sampled = batch.sampled_log_probs(now)
            clip = self.args.clip_ratio, self.args.clip_ratio_high
            loss, ratio, clipped = clipped_policy_loss(now, sampled, advantages, *clip)
            metrics = {"scored_tokens": torch.ones_like(ratio), "ratio": ratio, "clipped": clipped}
            if start is not None:
                metrics["kl_to_start"] = kl_estimate(now, start)
                loss = loss + self.args.kl_coef * metrics["kl_to_start"]
            self.compare_engine(batch, now)
            self.sums.add_tensors(**{n: x.detach() * (weights > 0) for n, x in metrics.items()})
            return (loss * weights).sum() / batch.denominator

        return batch.loss(model, temperature, loss_of)


def clipped_policy_loss(
    now: Tensor, sampled: Tensor, advantages: Tensor, clip: float, clip_high: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the ratio, and 1 where the ratio is clipped, of tokens [N].

    Args:
        now: [N] log-probabilities of the sampled tokens, differentiable.
        sampled: [N] the same by the policy that sampled them.
        advantages: [N].
        clip: e below 1.
        clip_high: e above 1; default clip.
    """
    ratio = (now - sampled).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    return loss, ratio, (ratio * advantages > bounded * advantages).to(ratio.dtype)


def kl_estimate(now: Tensor, start: Tensor) -> Tensor:
    """Return an estimate of the reverse KL to the start, from tokens sampled by the model now.

    Its value is exp(d) - 1 - d with d = log start - log now, which is never negative (Schulman,
    Approximating KL divergence, 2020, k3). The gradient of that value would be the forward KL's, so
    the gradient comes from -d log now instead, whose mean over samples is the reverse KL's.
    """
    difference = (start - now).detach()
    return difference.expm1() - difference - difference * (now - now.detach())

"""Write your own objective: a function of two SparseLogits that returns one loss per token.

The example is the skewed KL of DistiLLM (arXiv 2402.03898), KL(q || skew q + (1 - skew) p) of the
teacher q and the student p. It is at most log(1 / skew), while the forward KL is infinite where the
student has no mass. An objective sees `log_probs` [..., K] on the support and `log_tail` [...], the
log-probability of all other tokens. Autograd differentiates it on these small tensors, chunk by
chunk.
"""

from functools import partial

import torch

from opd_kernels import LazyLogits, SparseLogits, distillation_loss


def skewed_kl(student: SparseLogits, teacher: SparseLogits, *, skew: float = 0.1) -> torch.Tensor:
    """Return [...] nats, over the K tokens of the support and one bucket for all others."""
    log_p = torch.cat([student.log_probs, student.log_tail[..., None]], dim=-1)
    log_q = torch.cat([teacher.log_probs, teacher.log_tail[..., None]], dim=-1)
    live = log_q > -torch.inf  # empty slots are -inf in both, and their difference would be NaN
    log_p, log_q = log_p.masked_fill(~live, 0.0), log_q.masked_fill(~live, 0.0)
    log_ratio = torch.log(skew + (1 - skew) * (log_p - log_q).exp())
    return -(log_q.exp() * log_ratio).masked_fill(~live, 0.0).sum(-1)


def main() -> None:
    torch.manual_seed(0)
    tokens, vocab = 64, 5000
    hidden = torch.randn(tokens, 48)
    weight = torch.nn.Parameter(0.1 * torch.randn(vocab, 48))  # the student's head learns
    # The teacher's hidden size may differ from the student's.
    teacher = LazyLogits(torch.randn(tokens, 96), 0.4 * torch.randn(vocab, 96))
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    objective = partial(skewed_kl, skew=0.1)
    for step in range(30):
        student = LazyLogits(hidden, weight)
        output = distillation_loss(student, teacher, k=20, support="teacher", objective=objective)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {output.loss:.4f}  mass on S {output.student.mass.mean():.3f}")


if __name__ == "__main__":
    main()

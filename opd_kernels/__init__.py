"""Fused top-K distillation losses that never hold the [tokens, vocabulary] logits."""

from opd_kernels.backends import available_backends
from opd_kernels.divergences import forward_kl, jsd, policy_gradient, reverse_kl
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.distill import distillation_loss
from opd_kernels.loss.module import TopKDistillationLoss
from opd_kernels.loss.output import DistillationOutput
from opd_kernels.parallel import VocabShard
from opd_kernels.sparse_logits import SparseLogits

__version__ = "0.1.0"

__all__ = [
    "DistillationOutput",
    "LazyLogits",
    "SparseLogits",
    "TopKDistillationLoss",
    "VocabShard",
    "available_backends",
    "distillation_loss",
    "forward_kl",
    "jsd",
    "policy_gradient",
    "reverse_kl",
]

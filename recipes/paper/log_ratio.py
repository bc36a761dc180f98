"""A wrong objective: the sampled log-ratio, an estimate of reverse KL, used as a loss."""

from torch import Tensor

from opd_kernels import SparseLogits


def log_ratio(student: SparseLogits, teacher: SparseLogits) -> Tensor:
    """Return log p(y) - log q(y) of each sampled token y.

    Its gradient does not depend on the teacher, and has expectation 0.
    """
    return (student.log_probs - teacher.log_probs)[..., 0]

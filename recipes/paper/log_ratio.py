"""An objective that is wrong: the sampled log-ratio, an estimate of reverse KL, as a loss."""

from torch import Tensor

from opd_kernels import SparseLogits


def log_ratio(student: SparseLogits, teacher: SparseLogits) -> Tensor:
    """log p(y) - log q(y) of each sampled token y, whose gradient has nothing of the teacher and an
    expectation of 0.
    """
    return (student.log_probs - teacher.log_probs)[..., 0]

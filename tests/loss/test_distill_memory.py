"""Neither order allocates a tensor of N * V elements."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_kernels import LazyLogits, distillation_loss
from tests.distill_cases import OBJECTIVES


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.layout == torch.sparse_csr:
                self.elements = max(self.elements, 3 * tensor._nnz(), tensor.shape[0])
            else:
                self.elements = max(self.elements, tensor.untyped_storage().size() // 4)
        return out


@pytest.mark.parametrize("objective", ["reverse_kl", "renormalize", "bucket"])
@pytest.mark.parametrize("support", ["student", "union", "full"])
@pytest.mark.parametrize("method", ["one_pass", "recompute"])
def test_nothing_of_size_tokens_times_vocabulary_is_ever_allocated(method, support, objective):
    tokens, dim, vocab = 512, 8, 20_000
    student, teacher = (
        LazyLogits(
            torch.randn(tokens, dim, requires_grad=True),
            torch.randn(vocab, dim, requires_grad=True),
        )
        for _ in range(2)
    )
    chunk_bytes = 64 * vocab * 4
    with LargestTensor() as largest:
        out = distillation_loss(
            student, teacher, k=8, support=support, method=method, chunk_bytes=chunk_bytes,
            objective=OBJECTIVES[objective],
        )  # fmt: skip
        out.loss.backward()
    assert largest.elements >= vocab * dim  # the recorder works
    assert largest.elements <= tokens * vocab // 8

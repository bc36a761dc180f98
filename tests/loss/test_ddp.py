"""Two gloo processes: gradients through DDP equal those of one process on the whole batch."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from opd_kernels import distillation_loss
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from tests.ranks import run_ranks
from tests.tiny_models import tiny_batch, tiny_model


def _loss(model, teacher, ids, mask, inside, denominator):
    with torch.no_grad():
        target = lazy_logits(teacher, ids, mask)

    def compute_loss(logits):
        return distillation_loss(
            logits, target, k=8, token_weights=mask, denominator=denominator
        ).loss

    if inside:
        return call_with_lazy_logits(model, compute_loss, ids, mask)
    return compute_loss(lazy_logits(model, ids, mask))


def _worker(rank, folder, inside):
    torch.manual_seed(0)
    ids, mask = tiny_batch(rows=4)
    model = DistributedDataParallel(tiny_model("llama"))
    rows = slice(2 * rank, 2 * rank + 2)
    loss = _loss(model, tiny_model("llama", seed=1), ids[rows], mask[rows], inside, int(mask.sum()))
    (2 * loss).backward()  # DDP averages over the two ranks
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save(gradients, f"{folder}/rank{rank}.pt")


@pytest.mark.parametrize("inside", [True, False])
def test_ddp_gradients_are_synchronised_and_right(tmp_path, inside):
    torch.manual_seed(0)
    ids, mask = tiny_batch(rows=4)
    model = tiny_model("llama")
    _loss(model, tiny_model("llama", seed=1), ids, mask, inside, int(mask.sum())).backward()
    run_ranks(_worker, tmp_path, inside)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, parameter in model.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        scale = float(parameter.grad.abs().max())
        assert_close(ranks[0][name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)

"""Transformers models under FSDP2 and tensor parallelism have the gradients of one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from opd_kernels import distillation_loss
from opd_kernels.integrations.transformers import call_with_lazy_logits, lazy_logits
from opd_kernels.parallel import is_dtensor
from tests.ranks import run_ranks
from tests.tiny_models import tiny_batch, tiny_model

CASES = [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma2", {})]
ORDERS = [{}, {"method": "recompute"}, {"support": "full"}]


def _loss(model, teacher, ids, mask, denominator, **options):
    with torch.no_grad():
        target = lazy_logits(teacher, ids, mask)

    def compute_loss(logits):
        weighted = {"token_weights": mask, "denominator": denominator}
        return distillation_loss(logits, target, k=8, **weighted, **options).loss

    return call_with_lazy_logits(model, compute_loss, ids, mask)


def _expected(model, teacher, ids, mask, **options):
    model.zero_grad()
    loss = _loss(model, teacher, ids, mask, mask.sum(), **options)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def _assert_same(model, loss, expected):
    assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    named = dict(model.named_parameters())
    assert named.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        actual = named[name].grad
        actual = actual.full_tensor() if is_dtensor(actual) else actual
        assert_close(actual, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def _fsdp_worker(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    for name, changes in CASES:
        teacher = tiny_model(name, seed=1)
        ids, mask = tiny_batch(rows=4)
        model, whole = tiny_model(name, **changes), tiny_model(name, **changes)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rows = slice(2 * rank, 2 * rank + 2)  # each rank has its own tokens
        for options in ORDERS:
            expected = _expected(whole, teacher, ids, mask, **options)
            model.zero_grad()
            loss = _loss(model, teacher, ids[rows], mask[rows], mask.sum() / 2, **options)
            loss.backward()
            torch.distributed.all_reduce(loss := loss.detach().clone())
            _assert_same(model, loss / 2, expected)
    alone = tiny_model("llama")
    fully_shard(alone.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(alone, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"FSDP has freed the weight of \w*Llama.*; wrap the head with re"
    ):
        _loss(alone, teacher, ids, mask, 1)


def test_fsdp2_reduces_the_gradient_of_the_head(tmp_path):
    run_ranks(_fsdp_worker, tmp_path)


def _tp_worker(rank, folder):
    for n, (name, changes) in enumerate(CASES):
        teacher = tiny_model(name, seed=1)
        ids, mask = tiny_batch(rows=4)
        whole = tiny_model(name, **changes)
        saved = f"{folder}/{n}"
        if rank == 0:
            whole.save_pretrained(saved)
        torch.distributed.barrier()
        config = DistributedConfig(tp_size=2, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(
            saved, distributed_config=config, dtype=torch.float32
        )
        if not changes:
            assert is_dtensor(model.lm_head.weight)
        for options in ORDERS:
            expected = _expected(whole, teacher, ids, mask, **options)
            model.zero_grad()
            loss = _loss(model, teacher, ids, mask, mask.sum(), **options)
            loss.backward()
            _assert_same(model, loss.detach(), expected)


def test_tensor_parallel_heads_of_transformers_stay_split(tmp_path):
    run_ranks(_tp_worker, tmp_path)

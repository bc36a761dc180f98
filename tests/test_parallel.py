"""Vocabulary-parallel heads: every rank computes what one process with the whole head computes."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from opd_kernels import LazyLogits, VocabShard, distillation_loss, jsd, reverse_kl
from tests.distill_cases import OBJECTIVES, ORDERS, SUPPORTS, VOCAB, K, assert_same, pair
from tests.ranks import run_ranks
from tests.reference import OPTIONS, gradients, make_logits, operands, random_ids

# Rows of the weight on each rank. The last three rows are padding.
SPLITS = {
    2: {"even": [28, 28], "uneven": [45, 11], "padding": [53, 3], "none": [56, 0]},
    4: {"even": [14] * 4, "uneven": [1, 30, 3, 22], "none": [0, 53, 0, 3]},
}


def split(logits, sizes, rank):
    """Return this rank's part of the head, as leaves, and the slice of its rows."""
    first = sum(sizes[:rank])
    rows = slice(first, first + sizes[rank])
    leaves = [
        None if t is None else t[part].detach().clone().requires_grad_(t.requires_grad)
        for t, part in ((logits.hidden, ...), (logits.weight, rows), (logits.bias, rows))
    ]
    shard = VocabShard.from_weight(leaves[1])
    local = replace(logits, hidden=leaves[0], weight=leaves[1], bias=leaves[2], shard=shard)
    return local, rows


def assert_gradients(loss, local, expected, whole, rows):
    dhidden, *others = gradients(expected, whole)
    assert_same(gradients(loss, local), [dhidden, *(g[rows] for g in others)])


def check_losses(rank, sizes):
    """All objectives and supports, for a teacher that is split in the same way or whole. Uneven
    splits run every order, others one order per case.
    """
    for n, (objective, support) in enumerate((o, s) for o in OBJECTIVES for s in SUPPORTS):
        for order in ORDERS if sizes[0] == 45 else [ORDERS[n % 4]]:
            torch.manual_seed(n)
            student, teacher = pair(with_bias=n % 2 == 0)
            ids = random_ids(student, K) if support == "ids" else support
            local, rows = split(student, sizes, rank)
            theirs, _ = split(teacher, sizes, rank) if n % 3 else (teacher, None)
            options = {"k": K, "support": ids, "entropy": True, "token_weights": torch.rand(11)}
            options |= order | {"objective": OBJECTIVES[objective]}
            if support == "full" and objective in ("renormalize", "mixture"):
                with pytest.raises(ValueError, match="objective: with support='full' on a vocab"):
                    distillation_loss(local, theirs, **options)
                continue
            expected = distillation_loss(student, teacher, **options)
            output = distillation_loss(local, theirs, **options)
            assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-13)
            assert_close(output.per_token, expected.per_token, rtol=1e-12, atol=1e-13)
            for a, e in ((output.student, expected.student), (output.teacher, expected.teacher)):
                assert torch.equal(a.ids, e.ids)
                assert a.vocab_size == VOCAB
                assert_same([a.values, a.tail, a.entropy], [e.values, e.tail, e.entropy])
            assert_gradients(output.loss, local, expected.loss, student, rows)


def check_rows(rank, sizes):
    """Methods of LazyLogits, with every option of a head and two leading dimensions."""
    for n, options in enumerate(OPTIONS):
        torch.manual_seed(n)
        whole = make_logits(tokens=(2, 5), **options | {"padded": 3})
        local, rows = split(whole, sizes, rank)
        assert local.shape == whole.shape
        ids = random_ids(whole, K).reshape(2, 5, -1)
        weights = torch.randn(2, 5, K, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

        for call in (partial(LazyLogits.topk, k=K, entropy=True),
                     partial(LazyLogits.gather, ids=ids[..., :K], entropy=True)):  # fmt: skip
            actual, expected = call(local), call(whole)
            assert torch.equal(actual.ids, expected.ids)
            assert_same(
                [actual.values, actual.tail, actual.entropy],
                [expected.values, expected.tail, expected.entropy],
            )
            live = [x.values.masked_fill(x.values == -torch.inf, 0.0) for x in (actual, expected)]
            losses = [(v * weights[0]).sum() + (x.tail * weights[1]).sum()
                      for v, x in zip(live, (actual, expected), strict=True)]  # fmt: skip
            assert_gradients(losses[0], local, losses[1], whole, rows)
        assert_close(local.gather(ids, tail=False).values, whole.gather(ids, tail=False).values)
        targets = ids[..., 0].clamp_min(0)
        losses = [-(x.log_prob(targets) * weights[1]).sum() for x in (local, whole)]
        assert_gradients(losses[0], local, losses[1], whole, rows)
        losses = [(x.materialize().log_softmax(-1) ** 2).sum() for x in (local, whole)]
        assert_close(local.materialize(), whole.materialize(), rtol=1e-12, atol=1e-13)
        assert_gradients(losses[0], local, losses[1], whole, rows)
        complete = local.topk(VOCAB)
        assert torch.equal(complete.ids, whole.topk(VOCAB).ids)
        assert (complete.tail == -torch.inf).all()


def check_ties(rank, sizes):
    """The lower of two ids with equal logits on different ranks is selected. All ranks return a NaN
    of one rank.
    """
    torch.manual_seed(0)
    whole = make_logits(with_bias=False, softcap=None)
    # Integers have exact products. With others a BLAS may round a part of the weight differently.
    hidden, weight = ((4 * x.detach()).round() for x in (whole.hidden, whole.weight))
    whole = replace(whole, hidden=hidden, weight=weight[torch.arange(56) % 4].requires_grad_())
    local, _ = split(whole, sizes, rank)
    assert torch.equal(local.topk(9).ids, whole.topk(9).ids)
    poisoned = whole.weight.detach().clone()
    poisoned[3] = torch.nan
    local, _ = split(replace(whole, weight=poisoned), sizes, rank)
    assert local.topk(4).values.isnan().all()
    ids = torch.tensor([[50, 51]]).expand(11, 2)
    assert local.gather(ids).values.isnan().all()


def check_dtypes(rank, sizes):
    """Gradients of 16-bit and float32 operands have at most twice the error of one process."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        whole = make_logits(tokens=64, dim=32, dtype=dtype)
        teacher = make_logits(tokens=64, dim=32, dtype=dtype, requires_grad=False)
        wide = [None if t is None else t.detach().double().requires_grad_()
                for t in operands(whole)]  # fmt: skip
        exact = replace(whole, hidden=wide[0], weight=wide[1], bias=wide[2])
        local, rows = split(whole, sizes, rank)

        def compute_loss(student, order, teacher=teacher):
            if student.hidden.dtype == torch.float64:
                operands64 = [t.double() for t in operands(teacher)]
                names = ("hidden", "weight", "bias")
                teacher = replace(teacher, **dict(zip(names, operands64, strict=True)))
            ids = torch.arange(K).expand(64, K)
            options = {"support": ids, "objective": partial(reverse_kl, tail="bucket")}
            return distillation_loss(student, teacher, **options, **order).loss

        for order in ({"method": "one_pass"}, {"method": "recompute"}):
            reference = gradients(compute_loss(exact, order), exact)
            single = gradients(compute_loss(whole, order), whole)
            sharded = gradients(compute_loss(local, order), local)
            parts = (..., rows, rows)
            for g, one, ours, part in zip(reference, single, sharded, parts, strict=True):
                if ours.numel():
                    error, allowed = (ours - g[part]).norm(), (one - g).norm()
                    assert error <= 2 * allowed + 1e-12, (dtype, order)


def check_filter(rank, sizes):
    """The gradient filter's threshold applies to probabilities over the whole vocabulary. The K
    largest logits of every rank are always kept.
    """
    torch.manual_seed(2)
    student, teacher = pair(softcap=None, temperature=0.3)
    local, rows = split(student, sizes, rank)
    options = {"k": K, "objective": partial(reverse_kl, tail="bucket"), "gradient_filter": 0.02}
    expected, output = (distillation_loss(x, teacher, **options) for x in (student, local))
    assert 0 < float(expected.dropped.mean()) < 0.5
    assert (output.dropped <= expected.dropped + 1e-12).all()
    options["support"] = student.topk(K).ids
    expected, output = (distillation_loss(x, teacher, **options) for x in (student, local))
    assert_close(output.dropped, expected.dropped, rtol=1e-12, atol=1e-13)
    assert_gradients(output.loss, local, expected.loss, student, rows)


def check_dtensor(rank, sizes):
    """A DTensor weight that is split by rows defines its shard; other placements are refused."""
    world = len(sizes)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    for padded in (3, 0):  # 53 rows do not split evenly
        torch.manual_seed(3)
        student, teacher = pair(padded=padded)
        weight, bias = (
            distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_()
            for t in (student.weight, student.bias)
        )
        hidden = distribute_tensor(student.hidden.detach(), mesh, [Replicate()]).requires_grad_()
        local = replace(student, hidden=hidden, weight=weight, bias=bias)
        for support in ("student", "full"):
            expected, loss = (
                distillation_loss(x, teacher, k=K, support=support).loss for x in (student, local)
            )
            assert_close(loss, expected, rtol=1e-12, atol=1e-13)
            actual = torch.autograd.grad(loss, (hidden, weight, bias))
            whole = [g.full_tensor() for g in actual]  # type: ignore[attr-defined]
            assert_same(whole, gradients(expected, student))
    by_columns = distribute_tensor(torch.randn(8, 4), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"weight: expected a DTensor that is split by rows"):
        LazyLogits(torch.randn(2, 4), by_columns)


def check_refusals(rank, sizes):
    torch.manual_seed(4)
    student, teacher = pair()
    local, _ = split(student, sizes, rank)
    with pytest.raises(ValueError, match="rows of this rank's shard, got 57; make the shard with"):
        replace(local, weight=torch.zeros(57, 7, dtype=torch.float64), bias=None)
    other, _ = split(teacher, sizes[::-1], rank)
    if other.shard != local.shard:
        with pytest.raises(ValueError, match="expected a whole head or one that is split as the"):
            distillation_loss(local, replace(other, vocab_size=VOCAB), k=K, support="full")
    # With a support of K ids the teacher may be split differently.
    output = distillation_loss(local, replace(other, vocab_size=VOCAB), k=K)
    assert_close(output.loss, distillation_loss(student, teacher, k=K).loss)
    options = {"k": K, "objective": partial(jsd, beta=0.5), "reduction": "none"}
    losses = [distillation_loss(x, teacher, **options).loss for x in (local, student)]
    assert_close(*losses, rtol=1e-12, atol=1e-13)
    for support in ("student", "full"):  # only the head needs a gradient
        frozen, whole = (replace(x, hidden=x.hidden.detach()) for x in (local, student))
        losses = [distillation_loss(x, teacher, k=K, support=support).loss for x in (frozen, whole)]
        losses[0].backward()
        expected = torch.autograd.grad(losses[1], whole.weight)[0]
        rows = local.shard.rows(56)
        assert_close(local.weight.grad, expected[rows], rtol=1e-12, atol=1e-13)
        local.weight.grad = None
    fsdp = distribute_tensor(torch.randn(8, 4), init_device_mesh("cpu", (len(sizes),)), [Shard(0)])
    with pytest.raises(ValueError, match="under FSDP, where ranks have different tokens"):
        LazyLogits(torch.randn(2, 4), fsdp)


CHECKS = [check_rows, check_ties, check_dtypes, check_filter, check_refusals, check_losses]


def _worker(rank, folder, ranks):
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, sizes in SPLITS[ranks].items():
        for check in CHECKS:
            try:
                check(rank, sizes)
            except Exception as error:
                raise AssertionError(f"{check.__name__}, {name} of {ranks} ranks") from error
    check_dtensor(rank, SPLITS[ranks]["even"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_what_one_process_has(tmp_path, ranks):
    run_ranks(_worker, tmp_path, ranks, ranks=ranks)


def _dying_worker(rank, folder):
    torch.manual_seed(0)
    student, teacher = pair()
    local, _ = split(student, [28, 28], rank)
    distillation_loss(local, teacher, k=K).loss.backward()
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="another rank of the group may have failed or exited"):
        distillation_loss(local, teacher, k=K)
    assert time.monotonic() - start < 30
    Path(folder, "raised").touch()
    os._exit(0)


def test_a_dead_rank_is_told_by_the_others(tmp_path):
    run_ranks(_dying_worker, tmp_path)
    assert (tmp_path / "raised").exists()

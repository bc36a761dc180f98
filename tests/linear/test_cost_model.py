"""The cost model counts the kernels that are launched, recorded on meta tensors of a real head's
size.

Meta tensors have no values, so these tests also show that the host never waits for one.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_kernels import LazyLogits, SparseLogits, backends, reverse_kl
from opd_kernels.backends import available_backends, select_backend
from opd_kernels.backends.records import Operands, RowGradient, RowState
from opd_kernels.linear import cost_model, plan, products
from opd_kernels.linear.vocabulary_walk import backpropagate, reduce_logits
from opd_kernels.loss.options import LossOptions, TokenBatch
from opd_kernels.loss.token_walk import walk

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="needs Triton")
TOKENS, VOCAB, K = 3_000, 151_936, 20
# How often a launch reads or writes each of its tensors. Left out are placeholders, and `starts`,
# since a program reads only one number of it.
TRAFFIC = {
    "update_kernel": {"chunk": 1, "values": 2, "ids": 2, "maxima": 2, "sums": 2},
    "gradient_kernel": {"chunk": 1, "ids": 1, "dvalues": 1, "tails": 1, "dtails": 1, "out": 1},
    "linear_update_kernel": {
        "hidden": 1, "weight": 1, "target_columns": 1, "target_places": 1,
        "values": 1, "maxima": 1, "sums": 1,
    },
    "linear_gradient_kernel": {
        "hidden": 1, "weight": 1, "target_columns": 1, "target_places": 1,
        "dvalues": 1, "tails": 1, "dtails": 1, "out": 1,
    },
}  # fmt: skip
NAMES = {
    "update_kernel": "update",
    "gradient_kernel": "gradient",
    "linear_update_kernel": "fused update",
    "linear_gradient_kernel": "fused gradient",
}


class Recorder(TorchDispatchMode):
    """Records (name, FLOPs, bytes) of every matrix product, Triton launch, and elementwise pass
    over a float32 sum [v, D].
    """

    def __init__(self, monkeypatch, dim):
        super().__init__()
        from triton.runtime.jit import KernelInterface

        self.records, self.dim = [], dim
        monkeypatch.setattr(products, "_multiplies_16_bit", lambda device: True)
        monkeypatch.setattr(products, "_product", lambda a, b, out: self.product(a, b, out, 1))
        monkeypatch.setattr(products, "_add_product_", lambda out, a, b: self.product(a, b, out, 2))
        monkeypatch.setattr(KernelInterface, "__getitem__", lambda *args: self.launcher(*args))
        monkeypatch.setattr(backends, "reaches", lambda name, device: True)

    def product(self, a, b, out, times):
        if b.shape[1] == self.dim:
            name = "dweight" if a.is_contiguous() is False else "dhidden"
        else:
            name = "logits"
        flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        self.records.append((name, flops, a.nbytes + b.nbytes + times * out.nbytes))
        return out

    def launcher(self, kernel, grid):
        name = kernel.fn.__name__

        def launch(*args, **kwargs):
            if name == "reverse_kl_kernel":  # part of the model's "objective", which has no bytes
                return
            tensors = dict(zip(kernel.arg_names, args, strict=False))
            moved = sum(tensors[a].nbytes * times for a, times in TRAFFIC[name].items())
            if name == "update_kernel" and not kwargs["SELECTS"]:
                # Values are only written, and ids only read.
                moved -= tensors["values"].nbytes + tensors["ids"].nbytes
            flops = 0.0
            if name.startswith("linear"):
                rows, columns = tensors["hidden"].shape[0], tensors["weight"].shape[0]
                flops = 2.0 * rows * columns * self.dim
            self.records.append((NAMES[name], flops, moved))

        return launch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_sum = isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.dim
        if is_sum and out.shape[0] not in (0, 512, TOKENS):
            name = function.overloadpacket.__name__
            if name == "addmm_":
                self.product(args[1], args[2], out, 1)
            elif name in ("zeros_like", "zero_"):
                self.records.append(("zero", 0.0, out.nbytes))
            elif name in ("mul", "mul_", "copy_", "_to_copy"):
                source = args[1] if name == "copy_" else args[0]
                self.records.append(("round", 0.0, source.nbytes + out.nbytes))
        return out


def assert_same(records, kernels):
    """Compare names, order, FLOPs and bytes. The model may leave out 1 % of the bytes."""
    kernels = [k for k in kernels if k.name != "objective"]
    assert [r[0] for r in records] == [k.name for k in kernels]
    for (name, flops, moved), kernel in zip(records, kernels, strict=True):
        assert flops == kernel.flops, name
        assert moved == pytest.approx(kernel.bytes, rel=0.01), name


@pytest.fixture(params=[1_024, 4_096], ids=["fused", "unfused"])
def recorder(request, monkeypatch):
    return Recorder(monkeypatch, request.param)


def operands(dim):
    hidden = torch.empty(TOKENS, dim, dtype=torch.bfloat16, device="meta")
    return hidden, torch.empty(VOCAB, dim, dtype=torch.bfloat16, device="meta")


def make_model(dim):
    """A shape, a machine without a cache, and whether kernels have the matrix product inside."""
    from opd_kernels.backends.triton.configs import MAX_FUSED_DIM  # needs Triton

    machine = cost_model.Machine(1e15, 3e12, cache=0)
    return cost_model.Shape(TOKENS, dim, VOCAB, K, 2), machine, dim <= MAX_FUSED_DIM


@pytest.mark.parametrize("selects", [True, False])
def test_reduction(recorder, selects):
    hidden, weight = operands(recorder.dim)
    head = LazyLogits(hidden, weight).flat().head
    state = RowState.for_topk(TOKENS, K, False, torch.empty(0, device="meta"))
    state = replace(state, selects=selects)
    with recorder:
        reduce_logits(Operands(hidden, head), state, select_backend("triton", hidden.device), None)
    shape, machine, fused = make_model(recorder.dim)
    sizes = plan.recompute_sizes(TOKENS, VOCAB, 4, hidden.device, None)
    assert_same(recorder.records, cost_model.reduction(shape, *sizes, machine, selects, fused))


def test_backpropagation(recorder):
    hidden, weight = operands(recorder.dim)
    shape, machine, fused = make_model(recorder.dim)
    values = torch.empty(TOKENS, K, device="meta")
    ids = torch.empty(TOKENS, K, dtype=torch.int64, device="meta")
    dhidden, dweight = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(weight)
    head, tail = LazyLogits(hidden, weight).flat().head, values[:, 0].contiguous()
    gradient = RowGradient(ids, values, tail, tail)
    epilogues = select_backend("triton", hidden.device)
    with recorder:
        backpropagate(Operands(hidden, head), gradient, (dhidden, dweight, None), epilogues, None)
    sizes = plan.recompute_sizes(TOKENS, VOCAB, 2 if fused else 6, hidden.device, None)
    assert_same(recorder.records, cost_model.backpropagation(shape, *sizes, machine, fused))


@pytest.mark.parametrize("tokens", [TOKENS, 512], ids=["two chunks", "one chunk"])
def test_one_pass(recorder, tokens):
    hidden, weight = operands(recorder.dim)
    student = LazyLogits(hidden[:tokens].requires_grad_(), weight.requires_grad_())
    ids = torch.empty(tokens, K, dtype=torch.int64, device="meta")
    rows = torch.empty(tokens, K, device="meta")
    teacher = SparseLogits(rows, ids, rows[:, 0], VOCAB)  # a served one: no kernel of its own
    options = LossOptions(
        k=K, support="student", objective=reverse_kl, reduction="sum", method="one_pass",
        missing="drop", entropy=False, compact=True, chunk_bytes=None, backend="triton",
        gradient_filter=None, full=False,
    )  # fmt: skip
    batch = TokenBatch(student.flat(), teacher, "student", None, options)
    with torch.no_grad(), recorder:
        result = walk(batch, rows[:, 0], (True, True, False))
        result.gradients.scaled(torch.empty((), device="meta"))
    shape, machine, _ = make_model(recorder.dim)
    count = plan.one_pass_rows(tokens, VOCAB, 6, hidden.device, None)
    assert_same(
        recorder.records, cost_model.one_pass(replace(shape, tokens=tokens), count, machine)
    )


@pytest.mark.parametrize(("head", "tokens"), [((4_096, 151_936), 8_192)])
def test_one_pass_on_an_h100_is_near_its_four_products(head, tokens):
    """The roofline's bound for the order that "auto" picks, with at most 1.5 GiB of chunks."""
    from benchmarks import roofline

    (row,) = [r for r in roofline.estimates("H100", "Qwen3-8B", tokens) if r.chosen]
    assert head == roofline.SHAPES["Qwen3-8B"]
    assert plan._GPU_BUDGET == roofline.BUDGET == 1536 << 20
    assert row.ratio <= 1.30


def test_a_gpu_is_known_by_name_or_counts_as_the_nearest():
    gpus = cost_model.GPUS
    assert cost_model.find_gpu((9, 0), "NVIDIA H200") is gpus["H200"]
    assert cost_model.find_gpu((9, 0), "NVIDIA GH300") is gpus["H100"]
    assert cost_model.find_gpu((8, 9), "NVIDIA L40S") is gpus["RTX 4090"]
    assert cost_model.find_gpu((10, 3), "NVIDIA B300 SXM6") is gpus["B200"]
    assert cost_model.find_gpu((7, 0), "Tesla V100-SXM2-16GB") is gpus["T4"]
    assert gpus["H100"].machine(2).flops > 10 * gpus["H100"].machine(4).flops


def test_auto_needs_a_chunk_large_enough_to_pay_for_the_sum_of_dweight():
    shape = cost_model.Shape(512, 1_024, 151_936, K, operand_bytes=4)
    cpu = torch.device("cpu")
    row = 4 * 151_936
    assert plan.prefers_one_pass(shape, cpu, 256 * row, fused=False)
    assert not plan.prefers_one_pass(shape, cpu, 32 * row, fused=False)
    for tokens in (1, 5, 11):  # scaling dweight costs more than recomputing these few logits
        few = replace(shape, tokens=tokens)
        assert not plan.prefers_one_pass(few, cpu, 256 * row, fused=False)
    frozen = replace(shape, dweight=False)
    assert plan.prefers_one_pass(frozen, cpu, 64 * row, fused=False)
    assert not plan.prefers_one_pass(shape, cpu, 64 * row, fused=False)

"""LazyLogits checks its arguments before it computes anything."""

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits


class Quantised(torch.Tensor):
    """Its dtype is float32, as that of torchao's tensors, whose data are integers."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    def dequantize(self):
        return self.as_subclass(torch.Tensor)


def good():
    return {"hidden": torch.randn(2, 3, 8), "weight": torch.randn(20, 8), "bias": torch.randn(20)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"weight": torch.randn(8, 20)},
            ValueError,
            "pass lm_head.weight as it is, not transposed",
        ),
        ({"weight": torch.randn(20)}, ValueError, r"with the same D, got \(2, 3, 8\)"),
        ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \[V\] = \(20,\), got \(8,\)"),
        (
            {"hidden": torch.zeros(2, 8, dtype=torch.long)},
            TypeError,
            "hidden: expected a tensor of",
        ),
        ({"weight": torch.zeros(20, 8, dtype=torch.int8)}, TypeError, "dequantise it first"),
        ({"weight": [[1.0]]}, TypeError, "weight: expected a tensor of .*, got list"),
        ({"weight": torch.randn(20, 8, device="meta")}, ValueError, "weight: expected device cpu"),
        (
            {"weight": torch.randn(20, 8, device="meta")},
            ValueError,
            "got meta; a tensor on the meta device has no data, so load it first, and keep lm_head "
            "out of accelerate's offloading",
        ),
        (
            {"hidden": torch.randn(2, 3, 8, device="meta")},
            ValueError,
            "weight: expected device meta, as hidden's, got cpu; a tensor on the meta device",
        ),
        (
            {"weight": torch.zeros(20, 8).to(torch.float8_e4m3fn)},
            TypeError,
            r"got torch.float8_e4m3fn; cast or dequantise it first; for a model, exclude lm_head "
            r"from quantisation, or call model.dequantize\(\)",
        ),
        (
            {"weight": torch.zeros(20, 4, dtype=torch.uint8)},  # as of bitsandbytes and MXFP4
            TypeError,
            "weight: expected a tensor of .*, got torch.uint8; cast or dequantise it first",
        ),
        (
            {"weight": Quantised(torch.zeros(20, 8))},
            TypeError,
            "weight: expected a plain tensor, got Quantised, which is quantised; cast or dequant",
        ),
        (
            {"bias": torch.nn.Parameter(Quantised(torch.zeros(20)))},
            TypeError,
            "bias: expected a plain tensor, got Quantised",
        ),
        (
            {"vocab_size": 21},
            ValueError,
            "vocab_size: expected 1 to 20, the rows of weight, got 21",
        ),
        ({"vocab_size": 0}, ValueError, "vocab_size: expected 1 to 20"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive number or None, got -1.0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"scale": torch.ones(())}, TypeError, r"scale: .*got Tensor; .* pass float\(\.\.\.\)"),
        ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
        ({"vocab_size": 5.0}, TypeError, "vocab_size: expected an int, got float"),
        ({"vocab_size": True}, TypeError, "vocab_size: expected an int, got bool"),
        ({"temperature": 0.0}, ValueError, "greedy sampling has no distribution to distil"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a positive number"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ],
)
def test_bad_operands(changes, error, message):
    with pytest.raises(error, match=message):
        LazyLogits(**good() | changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x.topk(0), ValueError, "k: expected 1 to 20, the vocabulary, got 0"),
        (lambda x: x.topk(21), ValueError, 'support="full"'),
        (lambda x: x.topk(2.0), TypeError, "k: expected an int, got float"),
        (lambda x: x.topk(2, backend="fast"), ValueError, "backend: expected 'auto' or one of"),
        (
            lambda x: x.topk(2, chunk_bytes=-1),
            ValueError,
            "chunk_bytes: expected a positive number",
        ),
        (lambda x: x.gather(torch.zeros(2, 3, 1)), TypeError, "ids: expected an integer tensor"),
        (lambda x: x.gather(torch.zeros(6, 1).long()), ValueError, r"\(2, 3\), got \(6, 1\)"),
        (lambda x: x.gather(torch.zeros(2, 3).long()), ValueError, "add a last dimension"),
        (lambda x: x.gather(torch.zeros(2, 3, 0).long()), ValueError, "K >= 1"),
        (
            lambda x: x.gather(torch.zeros(2, 3, 1, device="meta").long()),
            ValueError,
            "ids: expected device cpu",
        ),
        (
            lambda x: x.gather(torch.zeros(2, 3, 1).long(), tail=False, entropy=True),
            ValueError,
            "entropy: it needs a pass over the vocabulary",
        ),
        (lambda x: x.log_prob(torch.zeros(6).long()), ValueError, "targets: expected one id a row"),
        (lambda x: x.gather(torch.zeros(2, 3, 1) * 1j), TypeError, "got torch.complex64"),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(LazyLogits(**good()))


def test_check_finite_names_the_rows():
    operands = good()
    operands["hidden"][1, 2, 3] = torch.nan
    operands["hidden"][0, 1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"in 2 row\(s\): \(0, 1\), \(1, 2\)"):
        LazyLogits(**operands, check_finite=True)
    flat = operands["hidden"].reshape(6, 8)
    with pytest.raises(ValueError, match=r"in 2 row\(s\): 1, 5"):
        LazyLogits(flat, operands["weight"], check_finite=True)
    LazyLogits(**operands)


def test_a_forced_backend_that_is_missing_raises(monkeypatch):
    logits = LazyLogits(**good())
    expected = logits.topk(2, backend="torch").values
    monkeypatch.setenv("OPD_BACKEND", "torch")
    assert torch.equal(logits.topk(2).values, expected)
    monkeypatch.setenv("OPD_BACKEND", "nothing")
    with pytest.raises(ValueError, match="got 'nothing' for tensors on cpu; choose an installed"):
        logits.topk(2)


def test_indexing_detaching_and_shape():
    logits = LazyLogits(**good(), vocab_size=18)
    assert logits.shape == (2, 3, 18)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert_close(logits[mask].materialize(), logits.materialize()[mask])
    trained = LazyLogits(logits.hidden, logits.weight.requires_grad_())
    assert trained.requires_grad
    assert not trained.detach().requires_grad
    with torch.no_grad():
        assert not trained.requires_grad

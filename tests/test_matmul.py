"""On a CPU products take the weight in slices, and upcast ones a few at a time."""

import pytest
import torch

from opd_kernels import matmul


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 64 rows of 16 float32, and room for three that are upcast."""
    monkeypatch.setattr(matmul, "_PROJECT_BYTES", 64 * 16 * 4 // torch.get_num_threads())
    monkeypatch.setattr(matmul, "_GRADIENT_BYTES", 64 * 16 * 4 // torch.get_num_threads())
    monkeypatch.setattr(matmul, "UPCAST_BYTES", 3 * 64 * 16 * 4)


@pytest.mark.parametrize("vocab", [1, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_slices")
def test_products_of_slices_are_those_of_the_whole(vocab, dtype):
    hidden, weight = torch.randn(7, 16), torch.randn(vocab, 16).to(dtype)
    wide = weight.double()
    logits = matmul.project(hidden, weight, torch.empty(7, vocab))
    torch.testing.assert_close(logits.double(), hidden.double() @ wide.T, rtol=1e-5, atol=1e-5)
    dhidden = torch.ones(7, 16)
    matmul.add_hidden_gradient_(dhidden, logits, weight)
    expected = 1 + logits.double() @ wide
    torch.testing.assert_close(dhidden.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("vocab", "slots"), [(1, 1), (64, 1), (65, 2), (192, 3), (1000, 3)])
@pytest.mark.usefixtures("small_slices")
def test_upcast_slices_take_turns_in_as_many_places_as_are_needed(vocab, slots):
    weight = torch.randn(vocab, 16).bfloat16()
    places = []
    for rows, part in matmul._slices(weight, torch.float32, matmul._PROJECT_BYTES):
        assert torch.equal(part, weight[rows].float())
        places.append(part.data_ptr())
    assert len(set(places[:slots])) == len(set(places)) == slots
    count = min(vocab, 64) * slots
    assert part.untyped_storage().nbytes() == count * 16 * 4

"""Matrix products on a CPU, which use slices of the weight: with the C++ extension every thread its
own, without it one at a time.
"""

from types import SimpleNamespace

import pytest
import torch

from opd_kernels.backends.extensions import cpu_extension as extension
from opd_kernels.linear import products

FLOATING = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["extension", "torch"])
def path(request, monkeypatch):
    """Select the extension's products or PyTorch's, with slices of 64 rows. `calls` lists the calls
    of the extension.
    """
    calls = []
    if request.param == "torch":
        monkeypatch.setattr(products, "extension", None)
    elif extension is None or not products._IS_X86:
        pytest.skip("the C++ backend is not built, or its products are not used")
    else:
        for name in ("project", "add_hidden_gradient_"):
            monkeypatch.setattr(extension, name, _counted(getattr(extension, name), name, calls))
    threads = torch.get_num_threads()
    monkeypatch.setattr(products, "SLICE_ROWS", 64)
    yield SimpleNamespace(name=request.param, calls=calls)
    torch.set_num_threads(threads)


def _counted(function, name, calls):
    def call(*arguments):
        calls.append(name)
        return function(*arguments)

    return call


def _check(hidden, weight, dtype=torch.float32, **tolerance):
    """Compare both products with float64 and return them."""
    count, vocab = len(hidden), len(weight)
    wide = weight.double()
    logits = products.project(hidden, weight, torch.full((count, vocab), torch.nan, dtype=dtype))
    torch.testing.assert_close(logits.double(), hidden.double() @ wide.T, **tolerance)
    dhidden = torch.ones(hidden.shape, dtype=dtype)
    products.add_hidden_gradient_(dhidden, logits, weight)
    torch.testing.assert_close(dhidden.double(), 1 + logits.double() @ wide, **tolerance)
    return logits, dhidden


@pytest.mark.parametrize("vocab", [1, 64, 65, 300])
@pytest.mark.parametrize("dtype", FLOATING)
def test_products_of_slices_are_those_of_the_whole(path, vocab, dtype):
    _check(torch.randn(7, 16), torch.randn(vocab, 16).to(dtype), rtol=1e-5, atol=1e-4)
    both = ["project", "add_hidden_gradient_"]
    assert path.calls == (both if path.name == "extension" else [])


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.usefixtures("path")
def test_nothing_times_anything_is_nothing(tokens, vocab, dtype):
    _check(torch.randn(tokens, 16), torch.randn(vocab, 16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATING])
@pytest.mark.usefixtures("path")
def test_float64_is_exact_to_its_own_rounding_whatever_the_weight_holds(dtype):
    hidden, weight = torch.randn(7, 16).double(), torch.randn(300, 16).to(dtype)
    _check(hidden, weight, torch.float64, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 5, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_columns_and_then_the_tokens(path, threads, dtype):
    hidden, weight = torch.randn(70, 300), torch.randn(331, 300).to(dtype)
    torch.set_num_threads(1)
    alone = _check(hidden, weight, rtol=1e-5, atol=1e-3)
    torch.set_num_threads(threads)
    together = _check(hidden, weight, rtol=1e-5, atol=1e-3)
    again = _check(hidden, weight, rtol=1e-5, atol=1e-3)
    for one, other, same in zip(alone, together, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
        assert torch.equal(other, same)


@pytest.mark.parametrize("threads", [1, 2, 8, 40])
@pytest.mark.parametrize("tokens", [1, 4, 33, 65])
@pytest.mark.parametrize("dim", [96, 130, 300])
@pytest.mark.usefixtures("path")
def test_no_division_among_threads_adds_up_worse_than_pytorch(threads, tokens, dim):
    hidden, weight = torch.randn(tokens, dim), torch.randn(1500, dim)
    dlogits, wide = torch.randn(tokens, 1500), weight.double()
    torch.set_num_threads(threads)
    logits = products.project(hidden, weight, torch.empty(tokens, 1500))
    dhidden = torch.zeros(tokens, dim)
    products.add_hidden_gradient_(dhidden, dlogits, weight)
    for ours, theirs, expected in (
        (logits, hidden @ weight.T, hidden.double() @ wide.T),
        (dhidden, dlogits @ weight, dlogits.double() @ wide),
    ):
        error, peer = ((x - expected).norm() for x in (ours, theirs))
        assert error <= 1.25 * peer


class Subclass(torch.Tensor):
    """A subclass may change the meaning of its values, so the extension must not read them."""


@pytest.mark.parametrize(
    ("weight", "is_taken"),
    [
        (torch.randn(16, 300).t(), False),
        (torch.randn(1, 16).expand(300, 16), False),
        (torch._neg_view(torch.randn(300, 16)), False),
        (torch._efficientzerotensor((300, 16)), False),
        (torch.randn(300, 16).as_subclass(Subclass), False),
        (torch.nn.Parameter(torch.randn(300, 16)), True),
        (torch.randn(300, 32)[:, :16], True),
    ],
    ids=["transposed", "expanded", "negated", "zero", "subclass", "parameter", "part"],
)
@torch.no_grad()
def test_weights_of_any_strides_and_kind(path, weight, is_taken):
    _check(torch.randn(7, 16), weight, rtol=1e-5, atol=1e-4)
    assert bool(path.calls) == (is_taken and path.name == "extension")


def test_a_lazy_copy_of_a_weight_stays_one(path):
    lazy = torch._lazy_clone(torch.randn(300, 16))
    _check(torch.randn(7, 16), lazy, rtol=1e-5, atol=1e-4)
    assert torch._C._is_cow_tensor(lazy)  # type: ignore[attr-defined]


def test_a_profiler_sees_the_products(path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _check(torch.randn(7, 16), torch.randn(300, 16), rtol=1e-5, atol=1e-4)
    names = {event.key for event in profile.key_averages()}
    ours = {"opd_kernels::project", "opd_kernels::add_hidden_gradient_"}
    assert names >= (ours if path.name == "extension" else {"aten::mm", "aten::addmm_"})


@pytest.mark.parametrize("vocab", [1, 64, 65, 1000])
def test_without_the_extension_one_upcast_slice_lives_at_a_time(monkeypatch, vocab):
    monkeypatch.setattr(products, "SLICE_ROWS", 64)
    weight = torch.randn(vocab, 16).bfloat16()
    places = set()
    for rows, part in products._slices(weight, torch.float32):
        assert torch.equal(part, weight[rows].float())
        places.add(part.data_ptr())
    assert len(places) == 1
    assert part.untyped_storage().nbytes() == min(vocab, 64 * torch.get_num_threads()) * 16 * 4

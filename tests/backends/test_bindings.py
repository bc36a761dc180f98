"""The compiled bindings with any arguments: valid ones give PyTorch's results, invalid ones are
refused by name, and no memory outside of a tensor changes.

The CUDA kernels run in the emulator. `make sanitize` runs these tests under the address and
undefined-behaviour sanitizers, `make fuzz` runs ten times as many random problems.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_kernels.backends import cpu
from tests import cuda_emulator
from tests.binding_cases import (
    CPU,
    CUDA,
    bytes_around,
    max_columns,
    placed,
    problems,
    small_problem,
)


def _of_wrong_dtype(name, tensor):
    dtypes = [torch.int32, torch.int64, torch.complex64, torch.bool]
    if name not in ("chunk", "dense", "out", "weight"):  # another floating dtype may fit these
        dtypes += [torch.float64, torch.float32]
    return [tensor.to(dtype) for dtype in dtypes if dtype != tensor.dtype]


def _of_wrong_shape(name, tensor):
    """Tensors of another rank, or longer along a side that another argument shares."""
    yield from (tensor[None], tensor[..., None], torch.zeros((), dtype=tensor.dtype))
    shared = {"chunk": (0,), "dense": (1,), "sums": (1,)}.get(name, range(tensor.dim()))
    for side in shared:
        sizes = list(tensor.shape)
        sizes[side] += 1
        yield torch.zeros(sizes, dtype=tensor.dtype)


def _of_wrong_strides(name, tensor):
    if tensor.dim() == 1:
        return placed(tensor, (2,)), tensor[:1].expand(len(tensor))
    rows, columns = tensor.shape
    overlapping = (tensor.as_strided(tensor.shape, (step, 1)) for step in (0, columns - 1))
    return placed(tensor, (1, rows)), placed(tensor, (2 * columns, 2)), *overlapping


def _without_its_memory(name, tensor):
    """As FSDP frees parameters, and on another device or in another layout."""
    freed = torch.zeros_like(tensor)
    freed.untyped_storage().resize_(0)
    negated = [torch._neg_view(tensor)] if tensor.is_floating_point() else []
    return freed, tensor.to("meta"), tensor.to_sparse(), *negated


def _refuses(run, call, names):
    """Assert that the message begins with one of the names and that no argument changes."""
    before = {n: bytes_around(x, False) for n, x in call.tensors().items() if _has_memory(x)}
    with pytest.raises((TypeError, ValueError)) as error:
        run(*call.arguments.values())
    assert str(error.value).startswith(tuple(f"{name}: " for name in names)), error.value
    for name, memory in before.items():
        assert torch.equal(memory, bytes_around(call.arguments[name], False)), name


def _has_memory(tensor):
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.data_ptr()


def _compare(name, actual, expected):
    assert actual.shape == expected.shape, name
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    rtol = {torch.float64: 1e-9, torch.float32: 2e-4}.get(actual.dtype, 2e-2)
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=(float(size) + 0.01) * rtol,
        equal_nan=True, msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def _agrees(run, problem, call):
    tensors = call.tensors()
    before = {n: bytes_around(x, n in call.written) for n, x in tensors.items()}
    expected = call.defined()
    returned = run(*call.arguments.values())
    for name, memory in before.items():
        assert torch.equal(memory, bytes_around(tensors[name], name in call.written)), name
    if problem.ids == "repeated":  # the package never passes them; only memory must stay intact
        return
    names = ("rows", "columns", "entries", "kept")
    actual = tensors | dict(zip(names, returned or (), strict=False))
    rows = torch.ones(problem.rows, dtype=torch.bool)
    if "sum" in actual:  # a NaN may be counted on S or in the tail: the loss is NaN either way
        nan, expected_nan = (
            x["sum"].isnan() | x["values"].isnan().any(1) for x in (actual, expected)
        )
        assert torch.equal(nan, expected_nan)
        rows = ~nan
    for name, value in expected.items():
        if value is None or actual.get(name) is None:
            continue
        a, e = (x[rows] if len(x) == len(rows) else x for x in (actual[name], value))
        _compare(name, a, e.to(a.dtype))


BINDINGS = [pytest.param(name, False, id=name) for name in CPU]
BINDINGS += [pytest.param(name, True, id=f"cuda-{name}") for name in CUDA]


def _binding(name, on_gpu):
    """Return a function of the extension, and the function that makes its calls."""
    if not on_gpu:
        if cpu.extension is None:
            pytest.skip("the C++ backend is not built")
        return getattr(cpu.extension, name), partial(CPU[name], on_gpu=False)
    if not cuda_emulator.is_available():
        pytest.skip("the emulator needs a C++ compiler")
    return getattr(cuda_emulator.emulated().extension, name), partial(CUDA[name], on_gpu=True)


@pytest.mark.parametrize(("name", "on_gpu"), BINDINGS)
@given(data=st.data())
def test_what_fits_gives_what_pytorch_gives(name, on_gpu, data):
    run, make = _binding(name, on_gpu)
    problem = data.draw(problems(on_gpu))
    torch.manual_seed(problem.seed)
    call = make(problem)
    if call.refused is None:
        _agrees(run, problem, call)
    else:
        _refuses(run, call, [call.refused])


@pytest.mark.parametrize("way", [_of_wrong_dtype, _of_wrong_shape, _of_wrong_strides,
                                 _without_its_memory])  # fmt: skip
@pytest.mark.parametrize(("name", "on_gpu"), BINDINGS)
def test_what_does_not_fit_is_refused_by_its_name(name, on_gpu, way):
    run, make = _binding(name, on_gpu)
    for selects in (False, True):
        call = make(small_problem(selects))
        for argument, tensor in call.tensors().items():
            # The other arguments are compared with these, so the message may name one of them.
            is_reference = argument in ("chunk", "dense", "hidden", "dhidden", "weight", "ids")
            names = [*call.tensors()] if is_reference else [argument]
            for spoilt in way(argument, tensor):
                _refuses(run, replace(call, arguments=call.arguments | {argument: spoilt}), names)


@pytest.mark.parametrize(("name", "on_gpu"), BINDINGS)
def test_numbers_out_of_range_are_refused(name, on_gpu):
    run, make = _binding(name, on_gpu)
    call = make(small_problem(selects=True))
    columns = call.arguments["chunk"].shape[1] if "chunk" in call.arguments else 0
    for argument, values in {
        "first_id": (-1, max_columns(on_gpu) - columns + 1, -(2**63)),
        "beta": (-0.1, 1.1, float("nan")),
        "slice_rows": (0, -1),
    }.items():
        for value in values if argument in call.arguments else ():
            _refuses(run, replace(call, arguments=call.arguments | {argument: value}), [argument])


@pytest.mark.parametrize("name", ["project", "add_hidden_gradient_"])
def test_a_weight_of_a_wider_dtype_is_refused(name):
    run, _ = _binding(name, False)
    hidden, weight, logits = torch.zeros(2, 3), torch.zeros(4, 3).double(), torch.zeros(2, 4)
    operands = (hidden, weight, logits) if name == "project" else (hidden, logits, weight)
    with pytest.raises(TypeError, match="weight: expected Float or a narrower float, got Double"):
        run(*operands, 1)


def test_more_columns_than_a_cuda_kernel_counts_are_refused():
    run, _ = _binding("sparse_product", True)
    ids, none = torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0)
    for columns in (1 << 28) + 1, (1 << 22) + 1:
        with pytest.raises(ValueError, match="dense: expected at most"):
            run(ids, none, torch.empty(0, columns), torch.empty(0, columns), 0)

"""What the compiled bindings do with any arguments: what fits gives what PyTorch gives, what does
not is refused by its name, and no memory beside a tensor changes.

The CUDA launchers run in the emulator. `make sanitize` runs these under the address and
undefined-behaviour sanitizers, `make fuzz` on ten times as many problems.
"""

import random
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from opd_kernels.backends import cpu
from tests import cuda_emulator
from tests.binding_cases import CPU, CUDA, Problem, bytes_around, placed, problems


def _dtype(name, tensor, others, rng):
    """A chunk of another floating dtype may fit, and a weight."""
    dtypes = [torch.int32, torch.int64, torch.complex64, torch.bool]
    dtypes += [] if name in ("chunk", "dense", "out", "weight") else [torch.float64, torch.float32]
    return tensor.to(rng.choice([dtype for dtype in dtypes if dtype != tensor.dtype]))


def _size(name, tensor, others, rng):
    """Of a matrix along the side that another argument has too."""
    sizes = list(tensor.shape)
    side = {"chunk": 0, "dense": 1, "sums": 1}.get(name, rng.randrange(len(sizes)))
    sizes[side] += rng.choice([1, 3])
    return torch.zeros(sizes, dtype=tensor.dtype)


def _rank(name, tensor, others, rng):
    return rng.choice([tensor[None], tensor[..., None], torch.zeros((), dtype=tensor.dtype)])


def _strides(name, tensor, others, rng):
    """The same shape, but not row after row."""
    if tensor.dim() == 1:
        return rng.choice([placed(tensor, (2,)), tensor[:1].expand(len(tensor))])
    rows, columns = tensor.shape
    if rows < 2 or columns < 2:
        return None
    overlapping = tensor.as_strided(tensor.shape, (rng.choice([0, columns - 1]), 1))
    return rng.choice([placed(tensor, (1, rows)), placed(tensor, (2 * columns, 2)), overlapping])


def _shared(name, tensor, others, rng):
    """In the memory of another argument, whose last element is its first, or all of it."""
    others = [x for x in others if x.dtype == tensor.dtype and x.numel() and x is not tensor]
    if not others or not tensor.numel():
        return None
    other = rng.choice(others)
    last = sum((n - 1) * s for n, s in zip(other.shape, other.stride(), strict=True))
    first = other.storage_offset() + rng.choice([0, last])
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if first + extent > other.untyped_storage().nbytes() // other.itemsize:
        return None
    return other.as_strided(tensor.shape, tensor.stride(), first)


def _freed(name, tensor, others, rng):
    """As FSDP frees parameters: the sizes are there, the memory is not."""
    if not tensor.numel():
        return None
    freed = torch.zeros_like(tensor)
    freed.untyped_storage().resize_(0)
    return freed


def _without_memory(name, tensor, others, rng):
    if not tensor.numel():
        return None
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def _negated(name, tensor, others, rng):
    return torch._neg_view(tensor) if tensor.is_floating_point() else None


OPTIONAL = ("bias", "teacher_bias", "upstream", "moment")
WAYS = {
    "dtype": _dtype, "size": _size, "rank": _rank, "strides": _strides, "shared": _shared,
    "freed": _freed, "without memory": _without_memory, "negated": _negated,
    "meta": lambda name, tensor, *_: tensor.to("meta"),
    "sparse": lambda name, tensor, *_: tensor.to_sparse(),
    "none": lambda *_: None,
    "list": lambda name, tensor, *_: tensor.tolist(),
}  # fmt: skip


def _spoil(call, way, rng):
    """Put something in the place of an argument that cannot be there; its name."""
    tensors = call.tensors()
    for name in rng.sample(sorted(tensors), len(tensors)):
        others = [x for n, x in tensors.items() if n in call.written or name in call.written]
        spoilt = WAYS[way](name, tensors[name], others, rng)
        if spoilt is None and (way != "none" or name in OPTIONAL):
            continue
        in_place = name == "chunk" and call.arguments.get("out") is tensors["chunk"]
        call.arguments |= {name: spoilt} | ({"out": spoilt} if in_place else {})
        return name
    assume(False)


def _named(message, names):
    """Whether a message begins with one of the names; pybind's own lists those of all arguments."""
    lists_all = "incompatible function arguments" in message and f"{names[-1]}: " in message
    return lists_all or message.startswith(tuple(f"{name}: " for name in names))


def _refuses(run, call, names):
    before = {n: bytes_around(x, False) for n, x in call.tensors().items() if _has_memory(x)}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        run(*call.arguments.values())
    assert _named(str(error.value), names), error.value
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
    if problem.ids == "repeated":  # no driver gives them: only memory is to be safe
        return
    names = ("rows", "columns", "entries", "kept")
    actual = tensors | dict(zip(names, returned or (), strict=False))
    rows = torch.ones(problem.rows, dtype=torch.bool)
    if "sum" in actual:  # a NaN is on S or off it, which makes no difference to the loss
        ours, theirs = (x["sum"].isnan() | x["values"].isnan().any(1) for x in (actual, expected))
        assert torch.equal(ours, theirs)
        rows = ~ours
    for name, value in expected.items():
        if value is None or actual.get(name) is None:
            continue
        a, e = (x[rows] if len(x) == len(rows) else x for x in (actual[name], value))
        _compare(name, a, e.to(a.dtype))


BINDINGS = [pytest.param(name, False, id=name) for name in CPU]
BINDINGS += [pytest.param(name, True, id=f"cuda-{name}") for name in CUDA]


def _binding(name, on_gpu):
    """A function of the extension, and what makes its arguments."""
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


@pytest.mark.parametrize(("name", "on_gpu"), BINDINGS)
@given(data=st.data())
def test_what_does_not_fit_is_refused_by_its_name(name, on_gpu, data):
    run, make = _binding(name, on_gpu)
    problem, way = data.draw(problems(on_gpu, least=2)), data.draw(st.sampled_from(sorted(WAYS)))
    torch.manual_seed(problem.seed)
    call = make(problem)
    assume(call.refused is None)
    spoilt = _spoil(call, way, random.Random(data.draw(st.integers(0, 2**31))))
    # Beside a matrix of another size or dtype, and beside other ids, the others do not fit.
    matrices = ("chunk", "dense", "hidden", "dhidden", "weight")
    is_told_by_others = spoilt in ("ids", *matrices) or way == "shared"
    _refuses(run, call, [*call.tensors(), spoilt] if is_told_by_others else [spoilt])


@pytest.mark.parametrize(("name", "on_gpu"), BINDINGS)
def test_numbers_out_of_range_are_refused(name, on_gpu):
    run, make = _binding(name, on_gpu)
    options = {"softcap": None, "scale": 1.0, "temperature": 1.0, "beta": 0.5, "before": 0}
    options |= {"out": None, "bias": False, "entropy": False, "selects": True, "upstream": True}
    options["block_per_row"] = False
    problem = Problem(0, 2, 9, 3, 0, torch.float32, 0, "near", "plain", options)
    last = (1 << 28 if on_gpu else 2**63 - 1) - problem.columns
    for argument, values in {
        "first_id": (-1, last + 1, 2**63 + 1, -(2**63), 0.5, "0", None),
        "beta": (-0.1, 1.1, float("nan"), "0", None),
        "scale": ("1", None, 1j), "inner": ("1", None), "capped": ("yes", None),
        "slice_rows": (0, -1, 2**63, 0.5, "1", None),
    }.items():  # fmt: skip
        for value in values:
            call = make(problem)
            if argument in call.arguments:
                call.arguments[argument] = value
                _refuses(run, call, [argument])


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

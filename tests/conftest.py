"""Fixtures of all tests: fixed seeds, poisoned uninitialised memory, and the backends to test."""

import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.device import DEVICE

if DEVICE.type == "cpu":  # set before Triton is imported, so that its kernels run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Without it cuBLAS is not deterministic, and PyTorch warns at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from opd_kernels import available_backends, backends
from tests import cuda_emulator

# Other processes are forked from one that has imported these modules, and PyTorch with them.
multiprocessing.set_forkserver_preload(["tests.faults", "tests.ranks"])

# A fourth backend: the CUDA kernels on the CPU. It is built when the first test needs it.
_EMULATED = "cuda-emulated"

# The profile of `make test` tries the same examples in every run, that of `make fuzz` new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("test", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=300, print_blob=True, **_COMMON)
settings.load_profile("test")

# Modules whose tensors live on DEVICE; those of the other modules live on the CPU.
_ON_DEVICE = {
    "test_distill", "test_distill_numbers", "test_divergences", "test_divergences_optima",
    "test_epilogues", "test_extreme_rows", "test_extremes", "test_gradient_filter",
    "test_operators", "test_operators_numbers", "test_native_products", "test_sparse_logits",
    "test_supports", "test_token_weights", "test_triton_linear", "test_reverse_kl",
}  # fmt: skip

# The slowest tests, slowest first: 20 seconds or more where nothing is cached yet.
_SLOWEST = [
    "test_audit.py::test_cuda",
    "test_audit.py::test_triton",
    "test_build.py::test_the_cuda_backend_is_built_without_a_gpu",
    "test_benchmarks.py::test_a_training_step_beside_trls_is_the_same_work",
    "test_cuda.py::test_random_problems",
    "test_cuda.py::test_a_planted_fault_is_caught",
]

if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in available_backends():
    from tests import triton_interpreter

    triton_interpreter.speed_up()


def pytest_collection_modifyitems(items):
    """Start the slowest tests first: run last, each would keep one worker busy alone."""
    order = {name: position for position, name in enumerate(_SLOWEST)}

    def position(item):
        name = f"{item.path.name}::{item.name.partition('[')[0]}"
        return order.get(name, len(order))

    items.sort(key=position)  # the sort is stable, so the other tests keep their order


@pytest.fixture
def device(request):
    """The device that this test's tensors live on."""
    on_device = request.module.__name__.rpartition(".")[2] in _ON_DEVICE
    return DEVICE if on_device else torch.device("cpu")


@pytest.fixture(autouse=True)
def _reproducible(device):
    torch.manual_seed(0)
    # torch.empty is filled with NaN, so a result that reads unwritten memory is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with nullcontext() if device.type == "cpu" else device:
        yield
    torch.use_deterministic_algorithms(False)


def _prepare(name, device):
    """Return the name of a backend that reaches the device; skip the test if it does not."""
    if name == _EMULATED:
        if device.type != "cpu" or not cuda_emulator.is_available():
            pytest.skip("the emulator needs a C++ compiler and tensors on the CPU")
        backends._backends()[_EMULATED] = cuda_emulator.emulated()
    if not backends.reaches(name, device):
        pytest.skip(f"{name} does not reach tensors on {device}")
    return name


_BACKENDS = [*available_backends(), _EMULATED]
_COMPILED = [n for n in available_backends() if n != "triton" or DEVICE.type != "cpu"]
_GPU_BACKENDS = [name for name in _BACKENDS if name not in ("cpu", "torch")]


@pytest.fixture(params=_BACKENDS)
def backend(request, device):
    """Every backend that reaches the device."""
    return _prepare(request.param, device)


@pytest.fixture(params=_COMPILED)
def compiled_backend(request, device):
    """Every backend that runs without an interpreter or an emulator here."""
    return _prepare(request.param, device)


@pytest.fixture(params=_GPU_BACKENDS)
def gpu_backend(request, device):
    """Every backend with kernels for GPUs."""
    return _prepare(request.param, device)

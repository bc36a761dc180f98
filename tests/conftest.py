"""Fixtures of all tests: fixed seeds, poisoned uninitialised memory, and the backends to try."""

import functools
import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.device import DEVICE

if DEVICE.type == "cpu":  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Without it cuBLAS is not deterministic, and PyTorch says so at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from opd_kernels import available_backends, backends
from tests import cuda_emulator

# Ranks, and runs that something happens to, are forked from a process that has imported all once.
multiprocessing.set_forkserver_preload(["tests.faults", "tests.ranks"])

# The CUDA kernels on the CPU, a fourth backend. It is built when a test first asks for it.
_EMULATED = "cuda-emulated"

# `make test` tries the same examples in every run, `make fuzz` (--hypothesis-profile fuzz) others.
_ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("test", max_examples=30, derandomize=True, **_ALWAYS)
settings.register_profile("fuzz", max_examples=300, print_blob=True, **_ALWAYS)
settings.load_profile("test")

# Whose tensors live on the DEVICE; the others' belong to the CPU.
_ON_DEVICE = {
    "test_distill", "test_distill_numbers", "test_divergences", "test_divergences_optima",
    "test_epilogues", "test_extreme_rows", "test_extremes", "test_gradient_filter",
    "test_operators", "test_operators_numbers", "test_native_products", "test_sparse_logits",
    "test_supports", "test_token_weights", "test_triton_linear", "test_reverse_kl",
}  # fmt: skip


def _hasten_the_interpreter():
    """It patches triton.language at every call of a device function, although the launch has done
    so, and makes a table of dtypes for every array: a third of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_what_is_not_patched(function):
        modules = (language, language.core)
        if any(language.core.is_builtin(module.load) for module in modules):
            return patch_lang(function)
        return None  # the call of a device function, which needs no scope to undo

    np_dtype = interpreter._get_np_dtype
    of_number = functools.cache(np_dtype)

    def np_dtype_of_scalar(dtype):
        scalar = dtype.scalar
        return np_dtype(scalar) if scalar.is_ptr() else of_number(scalar)  # pointers have no hash

    interpreter._patch_lang = patch_what_is_not_patched
    interpreter._get_np_dtype = np_dtype_of_scalar


if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in available_backends():
    _hasten_the_interpreter()


@pytest.fixture
def device(request):
    """Where this test's tensors are made."""
    on_device = request.module.__name__.rpartition(".")[2] in _ON_DEVICE
    return DEVICE if on_device else torch.device("cpu")


@pytest.fixture(autouse=True)
def _reproducible(device):
    torch.manual_seed(0)
    # torch.empty is filled with NaN, so that a result that reads unwritten memory shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with nullcontext() if device.type == "cpu" else device:
        yield
    torch.use_deterministic_algorithms(False)


_BACKENDS = [*available_backends(), _EMULATED]


def _prepared(name, device):
    if name == _EMULATED:
        if device.type != "cpu" or not cuda_emulator.is_available():
            pytest.skip("the emulator needs a C++ compiler and a CPU's tensors")
        backends._backends()[_EMULATED] = cuda_emulator.emulated()
    if not backends.reaches(name, device):
        pytest.skip(f"{name} does not reach tensors on {device}")
    return name


@pytest.fixture(params=_BACKENDS)
def backend(request, device):
    """Every backend that reaches the device; the operator tests run on each."""
    return _prepared(request.param, device)


_COMPILED = [n for n in available_backends() if n != "triton" or DEVICE.type != "cpu"]


@pytest.fixture(params=_COMPILED)
def compiled_backend(request, device):
    """Every backend that needs no interpreter or emulator here."""
    return _prepared(request.param, device)


@pytest.fixture(params=[name for name in _BACKENDS if name not in ("cpu", "torch")])
def gpu_backend(request, device):
    """Every backend with kernels for GPUs."""
    return _prepared(request.param, device)

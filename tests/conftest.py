"""Fixtures of all tests: fixed seeds, poisoned uninitialised memory, and the backends to try."""

import inspect
import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from opd_kernels import available_backends


def _patch_only_what_is_not_patched():
    """The interpreter looks for triton.language's builtins at every call of a device function. The
    launch has patched them all, and looking is half of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_all, first_builtin = interpreter._patch_builtin, {}

    def patch(package, *scope):
        if package not in first_builtin:
            members = inspect.getmembers(package)
            names = (name for name, member in members if language.core.is_builtin(member))
            first_builtin[package] = next(names, None)
        name = first_builtin[package]
        if name is not None and language.core.is_builtin(getattr(package, name)):
            patch_all(package, *scope)

    interpreter._patch_builtin = patch


if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in available_backends():
    _patch_only_what_is_not_patched()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # torch.empty is filled with NaN, so that a result that reads unwritten memory shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=available_backends())
def backend(request):
    """Every installed backend; the operator tests run on each."""
    return request.param

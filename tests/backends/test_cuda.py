"""The CUDA kernels in the emulator: random problems under the address sanitizer, and planted faults
that they must find. The tests of operators and epilogues run the kernels as `cuda-emulated`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_kernels import backends
from opd_kernels.backends import extensions, select_backend
from opd_kernels.backends.devices import capability
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, Head, RowState
from tests import cuda_emulator

CASES = 250
definition = Epilogues()
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(not cuda_emulator.is_available(), reason="needs a C++ compiler"),
    pytest.mark.skipif(os.environ.get("OPD_SANITIZE") == "1", reason="loads the sanitizer itself"),
]


def fuzz(library: Path, cases: int, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Run random problems in a process that loads the sanitizer's runtime and libstdc++ first."""
    runtimes = [
        subprocess.check_output([cuda_emulator.COMPILER, f"-print-file-name={name}"], text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.cuda_emulator.fuzz", str(library)]
    command += ["--cases", str(cases), "--seed", str(seed)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_random_problems():
    library = cuda_emulator.build(sanitize=True)
    assert b"__asan_report_load" in library.read_bytes()
    done = fuzz(library, CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{CASES} cases passed\n"


# Name: (file, original text, replacement, pattern of the expected message).
WRONG = r"case \d+, check_"
MUTANTS = {
    "a sort without its barrier": (
        "candidates.cuh", "      }\n      __syncwarp();\n    }", "      }\n    }", WRONG),
    "a sort that starts before the list is written": (
        "candidates.cuh", "  __syncwarp();\n  for (int run", "  for (int run", WRONG),
    "a list that is read before it is merged": (
        "epilogue.cu", "counts[place.warp] = best.count();\n    __syncthreads();",
        "counts[place.warp] = best.count();", WRONG),
    "tails that are merged before they are written": (
        "epilogue.cu", "    __syncthreads();\n    if (threadIdx.x == 0)",
        "    if (threadIdx.x == 0)", WRONG),
    "S that is read after the chunk is overwritten": (
        "epilogue.cu", "  __syncthreads();\n\n  // A row whose", "  // A row whose", WRONG),
    "S that is written before the rest": (
        "epilogue.cu", "  __syncthreads();\n\n  for (int slot = threadIdx.x",
        "  for (int slot = threadIdx.x", WRONG),
    "a divergence's sums that are read too early": (
        "divergence.cu", "= sum;\n  __syncthreads();", "= sum;", WRONG),
    "a barrier that some threads do not reach": (
        "epilogue.cu", "  __syncthreads();\n\n  // A row whose",
        "  if (threadIdx.x < 7) __syncthreads();\n\n  // A row whose",
        "__syncthreads: waits for threads"),
    "a ballot that some lanes are not in": (
        "candidates.cuh", "        const unsigned takers = __ballot_sync(kWholeWarp, is_taker);",
        "        const unsigned takers = lane_id() ? __ballot_sync(kWholeWarp, is_taker) : 0;",
        "__ballot_sync: waits for threads|are in different operations"),
    "a row that is one column too long": (
        "row.cuh", "unsigned(column) < unsigned(columns)", "unsigned(column) <= unsigned(columns)",
        WRONG),
    "vectors that are read past the chunk's end": (
        "elements.cuh", "first + kCount <= columns && misalignment(from",
        "first <= columns && misalignment(from", "AddressSanitizer: heap-buffer-overflow|" + WRONG),
    "columns that are written past the chunk's end": (
        "elements.cuh", "if (unsigned(first + i) < unsigned(columns)) to[i]",
        "if (unsigned(first + i) <= unsigned(columns)) to[i]",
        "AddressSanitizer: heap-buffer-overflow|" + WRONG),
    "a list that is one entry too long": (
        "candidates.cuh", "if (count > kCapacity) {", "if (count > kCapacity + 32) {",
        "AddressSanitizer: global-buffer-overflow|" + WRONG),
    "ties that go to the higher id": (
        "candidates.cuh", "(value == other && id < other_id)", "(value == other && id > other_id)",
        WRONG),
    "a tail without what was evicted": (
        "candidates.cuh", "      tail.absorb(evicted, true);", "", WRONG),
    "a run's last piece that is not added": (
        "sparse.cu", "total += partials[piece / OPD_PIECE * columns + column];", "", WRONG),
}  # fmt: skip


FAST = (
    "a sort without its barrier", "tails that are merged before they are written",
    "S that is read after the chunk is overwritten", "a barrier that some threads do not reach",
    "vectors that are read past the chunk's end", "columns that are written past the chunk's end",
)  # fmt: skip
assert set(FAST) < set(MUTANTS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MUTANTS]
)
def test_a_planted_fault_is_caught(name):
    changed, old, new, complaint = MUTANTS[name]
    edits = []

    def edit(source: str, text: str) -> str:
        if source != changed:
            return text
        edits.append(text.count(old))
        return text.replace(old, new)

    library = cuda_emulator.build(sanitize=True, edit=edit)
    assert edits == [1]
    done = fuzz(library, CASES)
    assert done.returncode != 0
    assert re.search(complaint, done.stderr), done.stderr[-2000:]


@pytest.fixture
def kernels():
    return cuda_emulator.emulated()


@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_backward_of_one_frequent_token(kernels, dim, dtype):
    """Many blocks add to one row of dweight; other rows have one entry."""
    tokens, vocab = 300, 1000
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.randperm(vocab)[: tokens * 3].view(tokens, 3)
    ids[:, 0] = torch.where(torch.arange(tokens) % 7 > 0, 4, -1)
    ids[:, 1:][ids[:, 1:] == 4] = -1
    coefficients = torch.randn(tokens, 3, dtype=wide)
    hidden, weight = torch.randn(tokens, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    sums = torch.randn(tokens, dim, dtype=wide), torch.randn(vocab, dim, dtype=wide)
    exact = [s.double() for s in sums]
    definition.sparse_backward(ids, coefficients.double(), hidden.double(), weight.double(), *exact)
    kernels.sparse_backward(ids, coefficients, hidden, weight, *sums)
    for actual, expected in zip(sums, exact, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_sparse_backward_adds_to_sums_of_any_strides(kernels, layout, monkeypatch):
    monkeypatch.setattr(backends.cuda, "_PARTIAL_BYTES", 1)  # a piece at a time
    ids, coefficients = torch.randint(5, (150, 1)), torch.randn(150, 1)
    hidden, weight = torch.randn(150, 8), torch.randn(5, 8)
    sums, expected = [], [torch.randn(150, 8), torch.randn(5, 8)]
    for total in expected:
        wide = total.t().clone().t()
        if layout == "strided":
            wide = torch.zeros(total.shape[0], 11)[:, :8]
        sums.append(wide.copy_(total))
    definition.sparse_backward(ids, coefficients, hidden, weight, *expected)
    kernels.sparse_backward(ids, coefficients, hidden, weight, *sums)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_a_device_that_no_code_was_made_for_is_not_reached(monkeypatch):
    extension = type("Extension", (), {"LEAST_CAPABILITY": 80})
    monkeypatch.setattr(backends.cuda, "load_extension", lambda: extension)
    cases = [((7, 5), False), ((8, 0), True), ((12, 1), True)]
    for index, (version, reached) in enumerate(cases):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, c=version: c)
        assert backends.reaches("cuda", torch.device("cuda", index)) is reached
    capability.cache_clear()


def test_auto_stays_with_triton_on_a_gpu(monkeypatch):
    triton, cuda = object(), object()
    installed = {"torch": definition, "triton": triton, "cuda": cuda}
    monkeypatch.setattr(backends, "_backends", lambda: installed)
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    monkeypatch.setattr(backends.cuda, "runs_on", lambda device: device.type == "cuda")
    monkeypatch.delenv("OPD_BACKEND", raising=False)
    gpu = torch.device("cuda")
    assert select_backend("auto", gpu) is triton
    assert select_backend("cuda", gpu) is cuda
    monkeypatch.setenv("OPD_BACKEND", "cuda")
    assert select_backend("auto", gpu) is cuda
    with pytest.raises(ValueError, match="'cuda' does not reach tensors on cpu"):
        select_backend("auto", torch.device("cpu"))
    monkeypatch.setenv("OPD_BACKEND", "triton")
    assert select_backend("auto", gpu) is triton
    monkeypatch.delenv("OPD_BACKEND")
    del installed["triton"]
    assert select_backend("auto", gpu) is cuda


def test_bindings_refuse_what_the_kernels_cannot_take(kernels):
    head = Head(torch.empty(9, 1), None, None, 1.0, 1.0, 9)
    state = RowState.for_topk(2, 3, False, torch.empty(0))
    with pytest.raises(TypeError, match="values: expected Double on cpu, got Float on cpu"):
        kernels.update(Chunk(torch.randn(2, 9).double(), head), state)
    with pytest.raises(ValueError, match="chunk: expected a matrix with contiguous rows"):
        kernels.update(Chunk(torch.randn(9, 2).t(), head), state)
    with pytest.raises(TypeError, match="chunk: expected a floating dtype, got Int"):
        kernels.update(Chunk(torch.ones(2, 9, dtype=torch.int32), head), state)
    with pytest.raises(ValueError, match=r"ids: expected \[4, K\] with K from 1 to 256, got"):
        kernels.update(Chunk(torch.randn(4, 9), head), state)


def test_an_extension_that_is_not_there_is_none(monkeypatch):
    monkeypatch.setattr(extensions.importlib.util, "find_spec", lambda name: None)
    assert backends.cuda.load_extension.__wrapped__() is None

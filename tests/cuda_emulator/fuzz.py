"""Compare the emulated kernels with PyTorch on random problems, and two orders of threads bitwise.

`python -m tests.cuda_emulator.fuzz LIBRARY --cases 240` needs its own process, since the address
sanitizer must be loaded before Python. It exits with 1 at the first case that differs.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels.backends.cuda import CudaEpilogues
from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState
from opd_kernels.sparse_logits import canonical_ids
from tests.cuda_emulator import load
from tests.reference import head_in_float64

definition = Epilogues()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the sizes of a vector and a tile.
COLUMNS = (1, 3, 8, 31, 33, 127, 255, 256, 257, 511, 513, 1023, 1025)


@dataclass
class Case:
    """A chunk [n, v] of raw products, its head, and a source of random choices."""

    raw: Tensor
    head: Head
    first_id: int
    rng: random.Random

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.raw.dtype == torch.float64 else torch.float32

    def upcast(self, dtype: torch.dtype) -> tuple[Tensor, Head]:
        head = head_in_float64(self.head) if dtype == torch.float64 else self.head
        return self.raw.to(dtype, copy=True), head

    def k(self, limit: int) -> int:
        return self.rng.choice((1, 2, 5, 20, 63, 64, 65, 128, 200, limit)) % limit + 1

    def ids(self, k: int) -> Tensor:
        """Return ids [n, k] in and around the chunk, without repeats; some slots are empty."""
        low, high = max(0, self.first_id - 3), self.first_id + self.raw.shape[1] + 3
        ids = torch.randint(low, high, (self.raw.shape[0], k))
        return canonical_ids(torch.where(torch.rand(ids.shape) < 0.1, -1, ids), high)


def random_case(rng: random.Random) -> Case:
    """Return a case of any dtype, alignment and stride, with ties, masks or sorted rows."""
    rows, columns = rng.randint(1, 6), rng.choice((*COLUMNS, rng.randint(2, 700)))
    dtype, first_id = rng.choice(DTYPES), rng.choice((0, 0, 17, 1_000))
    offset, gap = rng.randint(0, 9), rng.randint(0, 9)
    values = torch.randn(rows, columns) * rng.choice((0.5, 3.0, 20.0))
    match rng.choice(("plain", "plain", "ties", "ascending", "masked", "equal")):
        case "ties":
            values.round_()
        case "ascending":
            values = values.sort(dim=1).values
        case "masked":
            values[torch.rand(values.shape) < 0.3] = -torch.inf
        case "equal":
            values.fill_(0.25)
    # The memory around the rows is NaN, so that reading it shows in the results.
    memory = torch.full((rows, offset + columns + gap), torch.nan, dtype=dtype)
    raw = memory[:, offset : offset + columns]
    raw.copy_(values)
    bias = torch.randn(first_id + columns) if rng.random() < 0.4 else None
    softcap = rng.choice((None, None, 0.7, 5.0))
    if softcap is not None:  # a softcap makes masks of -inf finite
        raw.nan_to_num_(neginf=-9.0)
    scale, temperature = rng.choice(((1.0, 1.0), (1.0, 1.0), (0.3, 0.7), (-1.5, 2.0)))
    if scale < 0:
        raw.nan_to_num_(neginf=-9.0)
    weight = torch.empty(first_id + columns, 1)
    head = Head(weight, bias, softcap, scale, temperature, first_id + columns)
    return Case(raw, head, first_id, rng)


class MismatchError(Exception):
    """The results differ from the expected ones."""


def compare(
    name: str, actual: Tensor, same_dtype: Tensor, reference: Tensor, size: float = 1.0
) -> None:
    """Raise MismatchError if the error against float64 exceeds twice PyTorch's in the same dtype.

    PyTorch may be exact by chance on few numbers, so one rounding of the largest number, or of
    `size`, the size of the summed terms, is always allowed. For float64 PyTorch's result is the
    reference, and the bound is 1e-12 as in the operators' tests.
    """
    if not torch.equal(actual.isnan(), reference.isnan()):
        raise MismatchError(f"{name}: NaN in other places than expected")
    finite = reference.isfinite()
    if not torch.equal(actual.double()[~finite].nan_to_num(), reference[~finite].nan_to_num()):
        raise MismatchError(f"{name}: infinities in other places than expected")
    if not finite.any():
        return
    expected = reference[finite]
    error, torch_error = ((x.double()[finite] - expected).abs().max() for x in (actual, same_dtype))
    epsilon = 5e-13 if actual.dtype == torch.float64 else torch.finfo(actual.dtype).eps
    rounding = epsilon * max(size, expected.abs().max().item())
    if not error <= 2 * max(torch_error.item(), rounding):
        raise MismatchError(f"{name}: off by {error:.3e}, PyTorch by {torch_error:.3e}")


def in_any_order(run: Callable[[], list[Tensor]], rng: random.Random) -> list[Tensor]:
    """Return the results of a run; raise if another order of threads gives other bits."""
    results = []
    for _ in range(2):
        os.environ["OPD_EMULATOR_SEED"] = str(rng.getrandbits(32))
        results.append(run())
    for first, second in zip(*results, strict=True):
        if not torch.equal(first.nan_to_num(nan=7e4), second.nan_to_num(nan=7e4)):
            raise MismatchError("two orders of threads differ")
    return results[0]


def fresh_state(case: Case, k_or_ids: int | Tensor, dtype: torch.dtype, before: int) -> RowState:
    """Return a state after `before` logits of lower ids, which are the same for every dtype."""
    like = torch.empty(0, dtype=dtype)
    if isinstance(k_or_ids, Tensor):
        state = RowState.for_ids(k_or_ids.clone(), True, like)
    else:
        state = RowState.for_topk(case.raw.shape[0], k_or_ids, True, like)
    if before and case.first_id:
        earlier = torch.randn(case.raw.shape[0], before, generator=torch.Generator().manual_seed(5))
        identity = Head(torch.empty(before, 1), None, None, 1.0, 1.0, before)
        definition.update(Chunk(earlier.to(dtype), identity), state)
    return state


def check_update(case: Case, kernels: CudaEpilogues) -> None:
    before = case.rng.choice((0, 1, 16))
    k_or_ids: int | Tensor = case.k(256) if case.rng.random() < 0.6 else case.ids(case.k(512))
    selects = isinstance(k_or_ids, int)
    names = ("values", "tail", "entropy", "ids")

    def run() -> list[Tensor]:
        state = fresh_state(case, k_or_ids, case.accumulator, before)
        kernels.update(Chunk(case.raw, case.head, case.first_id), state)
        return [state.values, state.tail(), state.entropy(), state.ids]

    def defined(dtype: torch.dtype, k_or_ids: int | Tensor) -> list[Tensor]:
        state = fresh_state(case, k_or_ids, dtype, before)
        raw, head = case.upcast(dtype)
        definition.update(Chunk(raw, head, case.first_id), state)
        return [state.values, state.tail(), state.entropy(), state.ids]

    actual = in_any_order(run, case.rng)
    same_dtype = defined(case.accumulator, k_or_ids)
    if not torch.equal(actual[3], same_dtype[3]):
        raise MismatchError("ids: expected those of the largest logits, the lower ids for ties")
    if selects and (same_dtype[3] < 0).any():
        reference = defined(torch.float64, k_or_ids)  # the row has fewer than k logits
    else:
        reference = defined(torch.float64, same_dtype[3])
    for name, *tensors in zip(names[:3], actual, same_dtype, reference, strict=False):
        compare(name, *tensors)


def check_gradient(case: Case, kernels: CudaEpilogues) -> None:
    rows, columns = case.raw.shape
    ids = case.ids(case.k(512))
    dvalues, dtail = torch.randn(ids.shape).double(), torch.randn(rows).double()
    tail = case.upcast(torch.float64)[0].nan_to_num(neginf=-50.0).logsumexp(1)
    if case.rng.random() < 0.2:
        tail[0] = -torch.inf
    dtype = case.raw.dtype
    out_dtype = case.rng.choice(DTYPES[2:]) if dtype == torch.float32 else dtype
    memory = torch.full((rows, columns + 5), 3.0, dtype=out_dtype)
    out = memory[:, case.rng.randint(0, 5) :][:, :columns]
    in_place = case.rng.random() < 0.5

    def run() -> list[Tensor]:
        memory.fill_(3.0)
        chunk = torch.empty_strided(case.raw.shape, case.raw.stride(), dtype=dtype)
        chunk.copy_(case.raw)
        target = chunk if in_place else out
        on_rows = (t.to(case.accumulator) for t in (dvalues, tail, dtail))
        kernels.gradient(Chunk(chunk, case.head, case.first_id), RowGradient(ids, *on_rows), target)
        return [target.clone(), memory.clone()]

    def defined(wide: torch.dtype) -> Tensor:
        raw, head = case.upcast(wide)
        on_rows = (t.to(wide) for t in (dvalues, tail, dtail))
        definition.gradient(Chunk(raw, head, case.first_id), RowGradient(ids, *on_rows), raw)
        return raw

    actual, around = in_any_order(run, case.rng)
    compare("gradient", actual, defined(case.accumulator).to(actual.dtype), defined(torch.float64))
    if not in_place and (around == 3.0).sum() < 5 * rows:
        raise MismatchError("gradient: wrote outside of its columns")


def check_divergence(case: Case, kernels: CudaEpilogues) -> None:
    if case.first_id or not case.raw.isfinite().all():
        return check_gradient(case, kernels)
    beta = case.rng.choice((0.0, 0.3, 0.9, 1.0))
    rows, columns = case.raw.shape
    teacher = (torch.randn(rows, columns + 2) * 3).to(case.raw.dtype)[:, 2:]
    teacher_head = Head(torch.empty(columns, 1), None, None, 1.0, case.head.temperature, columns)
    upstream = torch.randn(rows).double()
    upstream[0] = 0.0

    def run() -> list[Tensor]:
        out = case.raw.clone()
        on_rows = (beta, upstream.to(case.accumulator))
        chunks = (Chunk(out, case.head), Chunk(teacher, teacher_head))
        loss = kernels.divergence(*chunks, *on_rows, out)
        return [loss, out]

    def defined(wide: torch.dtype) -> tuple[Tensor, Tensor]:
        raw, head = case.upcast(wide)
        on_rows = (beta, upstream.to(wide))
        chunks = (Chunk(raw, head), Chunk(teacher.to(wide), teacher_head))
        return definition.divergence(*chunks, *on_rows, raw), raw

    same_dtype, reference = defined(case.accumulator), defined(torch.float64)
    actual = in_any_order(run, case.rng)
    raw, head = case.upcast(torch.float64)
    log_p, log_q = (
        h.logits(Chunk(x, h).scores()).log_softmax(1)
        for h, x in ((head, raw), (teacher_head, teacher.double()))
    )
    weights = (log_q if beta == 0 else log_p).exp()
    sizes = (weights * (log_p.abs() + log_q.abs())).sum(1).max().item(), 1.0
    results = zip(("loss", "gradient"), actual, same_dtype, reference, sizes, strict=True)
    for name, result, same, exact, size in results:
        compare(name, result, same.to(result.dtype), exact, size)


def check_sparse(case: Case, kernels: CudaEpilogues) -> None:
    """Check sparse_backward with few ids, so that the run of an id spans several pieces."""
    rng, dtype, wide = case.rng, case.raw.dtype, case.accumulator
    tokens, k = rng.choice((1, 7, 90)), rng.choice((1, 3, 12))
    vocab, dim = rng.choice((2, 9, 400)), rng.choice((1, 7, 8, 24, 600))
    ids = canonical_ids(torch.randint(-2, vocab, (tokens, k)), vocab)
    coefficients = torch.randn(tokens, k, dtype=wide)
    hidden, weight = torch.randn(tokens, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    start = [torch.randn(tokens, dim, dtype=wide), torch.randn(vocab, dim, dtype=wide)]

    def run() -> list[Tensor]:
        sums = [s.clone() for s in start]
        kernels.sparse_backward(ids, coefficients, hidden, weight, *sums)
        return sums

    def defined(wide: torch.dtype) -> list[Tensor]:
        sums = [s.to(wide, copy=True) for s in start]
        dense = (hidden.to(wide), weight.to(wide))
        definition.sparse_backward(ids, coefficients.to(wide), *dense, *sums)
        return sums

    actual, same_dtype, reference = in_any_order(run, rng), defined(wide), defined(torch.float64)
    start = [s.abs() for s in start]
    hidden, weight, coefficients = hidden.abs(), weight.abs(), coefficients.abs()
    sizes = [total.max().item() for total in defined(torch.float64)]
    names = ("dhidden", "dweight")
    for name, *tensors in zip(names, actual, same_dtype, reference, sizes, strict=True):
        compare(name, *tensors)


CHECKS = (check_update, check_update, check_gradient, check_divergence, check_sparse)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    extension = load(arguments.library)
    for index in range(arguments.cases):
        seed = 1_000_003 * arguments.seed + index
        torch.manual_seed(seed)
        rng = random.Random(seed)
        case = random_case(rng)
        check = CHECKS[index % len(CHECKS)]
        try:
            check(case, CudaEpilogues(extension, long_row=rng.choice((0, 100, 10_000))))
        except MismatchError as mismatch:
            shape = f"{tuple(case.raw.shape)} of {case.raw.dtype}"
            sys.exit(f"case {seed}, {check.__name__}, {shape}: {mismatch}")
    print(f"{arguments.cases} cases passed")


if __name__ == "__main__":
    main()

"""Random calls of the compiled bindings, with the results of the PyTorch definition.

The bindings are private, but a wrong size, dtype or stride would read or write foreign memory, and
these cases have found such writes. So csrc/checks.h refuses every tensor that does not match the
kernel's pointers: device, dtype, shape, strides, freed memory, and views or subclasses whose memory
holds other numbers. It does not look for outputs that overlap inputs, since the package allocates
all outputs, and leaves other Python types to pybind11.

Every tensor lies in the middle of its own memory, so that an access outside of it shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from opd_kernels.backends.epilogues import Epilogues
from opd_kernels.backends.records import Chunk, Head, RowGradient, RowState
from opd_kernels.sparse_logits import canonical_ids

definition = Epilogues()
_GUARD = 64  # elements on either side of a tensor
_INT64 = torch.iinfo(torch.int64)
_KS = (64, 65, 256, 257, 512, 513, 1025)  # around the limits of the kernels
_FLOATING = (torch.float32, torch.float64)
_COLUMNS = (1, 2, 7, 33, 130, 511, 513, 1100)  # around the sizes of vectors, tiles and blocks


def placed(values: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Return the same numbers in the middle of memory filled with NaN, or with -1 for integers."""
    strides = strides or torch.empty(values.shape, device="meta").stride()
    extent = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
    fill = torch.nan if values.is_floating_point() else -1
    memory = torch.full((2 * _GUARD + extent,), fill, dtype=values.dtype)
    return memory.as_strided(values.shape, strides, _GUARD).copy_(values)


def bytes_around(tensor: Tensor, is_written: bool) -> Tensor:
    """Return the bytes of a tensor's memory that must not change: all, or only those outside of the
    tensor if it is written.
    """
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if not is_written:
        return memory.clone()
    items = memory.view(-1, tensor.itemsize)
    outside = torch.ones(len(items), dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return items[outside]


@dataclass(repr=False)  # printing a tensor whose memory is freed ends the process
class Call:
    """The arguments of a binding in its order, and the expected results."""

    arguments: dict[str, Any]
    written: tuple[str, ...]  # names of the arguments that the binding writes
    defined: Callable[[], dict[str, Tensor]]  # the results by argument or return value
    refused: str | None = None  # the argument that the binding refuses

    def tensors(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.arguments.items() if isinstance(x, Tensor)}


@dataclass(frozen=True)
class Problem:
    """Sizes, dtypes and options of a call. The tensors follow from the seed, so that hypothesis can
    print a problem.
    """

    seed: int
    rows: int
    columns: int
    k: int
    gap: int  # elements between the rows of matrices
    dtype: torch.dtype
    first_id: int
    ids: str
    logits: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype or self.accumulator)

    def vector(self) -> Tensor:
        return placed(self.random(self.rows))

    def matrix(self, columns: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        columns = self.columns if columns is None else columns
        values = self.random(self.rows, columns, dtype=dtype or self.dtype) * 3
        return placed(values, (columns + self.gap, 1))

    def chunk(self) -> Tensor:
        chunk = self.matrix()
        number = {"nan": torch.nan, "inf": torch.inf, "masked": -torch.inf}.get(self.logits)
        if number is not None:
            chunk[torch.rand(chunk.shape) < 0.1] = number
        return chunk

    def support(self) -> Tensor:
        """Return ids [n, K] in and around the chunk, or at the ends of int64."""
        near = torch.randint(-4, self.columns + 4, (self.rows, self.k))
        ids = torch.where(near < -2, -1, near + self.first_id)
        if self.ids == "far":
            far = torch.tensor([_INT64.min, _INT64.min + 1, _INT64.max, -self.first_id - 1])
            is_far = torch.rand(ids.shape) < 0.5
            ids = torch.where(is_far, far[torch.randint(len(far), ids.shape)], ids)
        if self.ids != "repeated":
            ids = self._distinct(ids)
        return placed(ids)

    def _distinct(self, ids: Tensor) -> Tensor:
        """Replace repeated ids of a row by -1, an empty slot, as canonical_ids does."""
        first = torch.ones_like(ids, dtype=torch.bool)
        if ids.numel():
            same = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
            first = ~same
        return ids.masked_fill(~first, -1)

    def head(self) -> tuple[dict[str, Any], Head]:
        """Return a head's arguments, and the head without its bias for scores that include it."""
        cap, scale, temperature = (self.options[n] for n in ("softcap", "scale", "temperature"))
        bias = placed(self.random(self.columns)) if self.options["bias"] else None
        head = Head(torch.empty(0, 1), None, cap, scale, temperature, self.columns)
        factors = dict(zip(("capped", "inner", "outer"), head.factors, strict=True))
        return {"bias": bias, **factors}, head


def _scores(chunk: Tensor, head: dict[str, Any], dtype: torch.dtype) -> Tensor:
    scores = chunk.to(dtype, copy=True)
    return scores if head["bias"] is None else scores.add_(head["bias"])


def _columns_of(ids: Tensor, problem: Problem) -> Tensor:
    """Return ids as columns of the chunk, -1 for ids outside of it, without an overflow."""
    first, last = problem.first_id, problem.first_id + problem.columns
    inside = (ids >= first) & (ids < last)
    return torch.where(inside, ids - first, -1)


def update(problem: Problem, on_gpu: bool) -> Call:
    chunk, (head, plain) = problem.chunk(), problem.head()
    selects, entropy = problem.options["selects"], problem.options["entropy"]
    like = torch.empty(0, dtype=problem.accumulator)
    if selects:
        state = RowState.for_topk(problem.rows, problem.k, entropy, like)
    else:
        state = RowState.for_ids(problem.support(), entropy, like)
    if problem.options["before"] and problem.first_id and problem.k:
        earlier = problem.random(problem.rows, problem.options["before"])
        identity = Head(torch.empty(0, 1), None, None, 1.0, 1.0, earlier.shape[1])
        ids = state.ids if selects else torch.full_like(state.ids, -1)
        definition.update(Chunk(earlier, identity), replace(state, ids=ids))
    if problem.ids == "repeated":  # the package never passes this; only memory must stay intact
        state.values[torch.rand(state.values.shape) < 0.3] = torch.nan
        state = replace(state, ids=problem.support())
    fields = {n: getattr(state, n) for n in ("values", "ids", "max", "sum", "moment")}
    fields = {n: None if x is None else placed(x) for n, x in fields.items()}
    arguments = {"chunk": chunk, "first_id": problem.first_id, **head}
    arguments |= {"values": fields["values"], "ids": fields["ids"], "selects": selects}
    arguments |= {"max": fields["max"], "sum": fields["sum"], "moment": fields["moment"]}
    if on_gpu:
        arguments |= {"block_per_row": problem.options["block_per_row"], "stream": 0}

    def defined() -> dict[str, Tensor]:
        ids = state.ids if selects else _columns_of(state.ids, problem)
        expected = replace(state, ids=ids.clone())
        if problem.rows and problem.columns:
            # Ties go to the lower id, so the ids of a selection must be the true ones.
            first_id = problem.first_id if selects else 0
            scores = _scores(chunk, head, problem.accumulator)
            definition.update(Chunk(scores, plain, first_id), expected)
        names = ("values", "max", "sum", "moment") + (("ids",) if selects else ())
        return {n: getattr(expected, n) for n in names}

    written = ("values", "max", "sum") + (("moment",) if entropy else ())
    min_k, max_k = (int(selects), 256 if selects else 512) if on_gpu else (1, problem.k)
    refused = None if min_k <= problem.k <= max_k else "ids"
    return Call(arguments, written + (("ids",) if selects else ()), defined, refused)


def gradient(problem: Problem, on_gpu: bool, threshold: bool = False) -> Call:
    chunk, (head, plain) = problem.chunk(), problem.head()
    ids = problem.support()
    rows = {"ids": ids, "dvalues": placed(problem.random(*ids.shape)), "tail": problem.vector(),
            "dtail": problem.vector()}  # fmt: skip
    rows["tail"] += 10  # keeps the softmax within the range of float16
    if problem.logits == "inf":
        rows["tail"].fill_(-torch.inf)
    arguments = {"chunk": chunk} | ({} if threshold else {"first_id": problem.first_id}) | head
    arguments |= rows
    if threshold:
        arguments["threshold"] = placed(torch.full((problem.rows,), 0.123, dtype=problem.dtype))
    if on_gpu:
        narrow = problem.options["out"] if problem.dtype == torch.float32 else None
        out = chunk if narrow is None else problem.matrix(dtype=narrow)
        arguments |= {"out": out, "stream": 0}
    original = chunk.clone()

    def on_columns() -> RowGradient:
        columns = _columns_of(ids, problem)
        return RowGradient(columns, rows["dvalues"], rows["tail"], rows["dtail"])

    def defined() -> dict[str, Tensor]:
        scores = _scores(original, head, problem.accumulator)
        if threshold:
            sparse, kept = definition.filtered_gradient(
                Chunk(scores, plain), on_columns(), arguments["threshold"]
            )
            parts = {"rows": sparse.rows, "columns": sparse.columns, "entries": sparse.values}
            return parts | {"kept": kept}
        if problem.rows and problem.columns:
            definition.gradient(Chunk(scores, plain), on_columns(), scores)
        return {"out" if on_gpu else "chunk": scores}

    written = () if threshold else ("out" if on_gpu else "chunk",)
    if on_gpu and arguments["out"] is chunk:
        written = ("chunk", "out")
    refused = "ids" if on_gpu and problem.k > 512 else None
    return Call(arguments, written, defined, refused)


def filtered_gradient(problem: Problem, on_gpu: bool) -> Call:
    return gradient(replace(problem, first_id=0), on_gpu, threshold=True)


def divergence(problem: Problem, on_gpu: bool) -> Call:
    chunk, (head, plain) = problem.chunk(), problem.head()
    other = replace(problem, options=problem.options | {"bias": not problem.options["bias"]})
    teacher, (teacher_head, teacher_plain) = other.matrix(), other.head()
    beta, upstream = problem.options["beta"], None
    if problem.options["upstream"]:
        upstream = problem.vector()
        upstream[::3] = 0.0
    loss = placed(torch.zeros(problem.rows, dtype=problem.accumulator))
    arguments = {"chunk": chunk, **head, "teacher": teacher}
    arguments |= {f"teacher_{name}": value for name, value in teacher_head.items()}
    arguments |= {"beta": beta, "upstream": upstream, "loss": loss}
    if on_gpu:
        narrow = problem.options["out"] if problem.dtype == torch.float32 else None
        out = chunk if narrow is None else problem.matrix(dtype=narrow)
        arguments |= {"out": out, "stream": 0}
    original = chunk.clone()
    result = "out" if on_gpu else "chunk"

    def defined() -> dict[str, Tensor]:
        dtype = problem.accumulator
        scores = _scores(original, head, dtype)
        teacher_chunk = Chunk(_scores(teacher, teacher_head, dtype), teacher_plain)
        losses = definition.divergence(Chunk(scores, plain), teacher_chunk, beta, upstream, scores)
        return {"loss": losses} | ({} if upstream is None else {result: scores})

    written = ("loss",) if upstream is None else ("loss", result)
    if on_gpu and upstream is not None and arguments["out"] is chunk:
        written = ("loss", "out", "chunk")
    return Call(arguments, written, defined, "teacher" if problem.columns == 0 else None)


def sparse_product(problem: Problem, on_gpu: bool) -> Call:
    """The problem's columns are D; V is a constant."""
    vocab = 9
    ids = placed(canonical_ids(torch.randint(-2, vocab, (problem.rows, problem.k)), vocab))
    if problem.ids == "far" and ids.numel():
        ids[torch.rand(ids.shape) < 0.3] = (_INT64.min, _INT64.max, vocab)[problem.seed % 3]
    coefficients = placed(problem.random(problem.rows, problem.k))
    dense = replace(problem, rows=vocab).matrix()
    sums = placed(problem.random(problem.rows, problem.columns))
    start = sums.clone()

    def defined() -> dict[str, Tensor]:
        total = start.clone()
        live = ids.masked_fill((ids < 0) | (ids >= vocab), -1)
        wide = dense.to(problem.accumulator)
        definition.sparse_backward(live, coefficients, wide, wide, total, None)
        return {"sums": total}

    arguments = {"ids": ids, "coefficients": coefficients, "dense": dense, "sums": sums}
    return Call(arguments | {"stream": 0}, ("sums",), defined)


def sparse_scatter(problem: Problem, on_gpu: bool) -> Call:
    """The problem's columns are D and its rows are tokens; V is a constant."""
    vocab, entries = 5, problem.k * 3
    ids = torch.randint(-2, vocab, (entries,)) if problem.rows else torch.full((entries,), -1)
    rows = torch.randint(0, max(1, problem.rows), (entries,))
    if problem.ids == "far" and entries:
        ids[torch.rand(entries) < 0.3] = (_INT64.min, _INT64.max, vocab)[problem.seed % 3]
        rows[torch.rand(entries) < 0.3] = (_INT64.min, _INT64.max, problem.rows)[problem.seed % 3]
    ids = placed(ids.sort().values)
    rows, coefficients = placed(rows), placed(problem.random(entries))
    dense, sums = problem.matrix(), placed(problem.random(vocab, problem.columns))
    start = sums.clone()

    def defined() -> dict[str, Tensor]:
        live = (ids >= 0) & (ids < vocab) & (rows >= 0) & (rows < problem.rows)
        terms = dense.to(problem.accumulator)[rows[live]] * coefficients[live, None]
        return {"sums": start.index_add(0, ids[live], terms)}

    arguments = {"ids": ids, "rows": rows, "coefficients": coefficients, "dense": dense}
    return Call(arguments | {"sums": sums, "stream": 0}, ("sums",), defined)


def project(problem: Problem, on_gpu: bool) -> Call:
    """The problem's K is D."""
    hidden, weight = problem.matrix(problem.k), _weight(problem)
    out = problem.matrix()
    arguments = {"hidden": hidden, "weight": weight, "out": out, **_slice_rows(problem)}

    def defined() -> dict[str, Tensor]:
        return {"out": hidden.double() @ weight.double().T}

    return Call(arguments, ("out",), defined, None if problem.k else "weight")


def add_hidden_gradient(problem: Problem, on_gpu: bool) -> Call:
    """The problem's K is D."""
    dhidden, weight = problem.matrix(problem.k), _weight(problem)
    dlogits, start = problem.matrix(), dhidden.clone()
    arguments = {"dhidden": dhidden, "dlogits": dlogits, "weight": weight, **_slice_rows(problem)}

    def defined() -> dict[str, Tensor]:
        return {"dhidden": start.double() + dlogits.double() @ weight.double()}

    return Call(arguments, ("dhidden",), defined, None if problem.k else "weight")


def _weight(problem: Problem) -> Tensor:
    """Return a weight [v, D] of the problem's dtype or a narrower one."""
    narrow = problem.options["out"] or (torch.float32 if problem.seed % 2 else problem.dtype)
    return replace(problem, rows=problem.columns).matrix(problem.k, dtype=narrow)


def _slice_rows(problem: Problem) -> dict[str, int]:
    return {"slice_rows": (1, 50, _INT64.max)[problem.seed % 3]}


CPU = {"update": update, "gradient_": gradient, "filtered_gradient": filtered_gradient,
       "divergence_": divergence, "project": project,
       "add_hidden_gradient_": add_hidden_gradient}  # fmt: skip
CUDA = {"update": update, "gradient": gradient, "divergence": divergence,
        "sparse_product": sparse_product, "sparse_scatter": sparse_scatter}  # fmt: skip


@st.composite
def problems(draw, on_gpu: bool) -> Problem:
    dtypes = (*_FLOATING, torch.bfloat16, torch.float16) if on_gpu else _FLOATING
    options = {
        "softcap": draw(st.sampled_from([None, None, 3.0])),
        "scale": draw(st.sampled_from([1.0, -0.7])),
        "temperature": draw(st.sampled_from([1.0, 0.5])),
        "beta": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "before": draw(st.sampled_from([0, 1, 40])),
        "out": draw(st.sampled_from([None, torch.bfloat16, torch.float16])),
    }
    for name in ("bias", "entropy", "selects", "upstream", "block_per_row"):
        options[name] = draw(st.booleans())
    columns = draw(st.integers(0, 40) | st.sampled_from(_COLUMNS))
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        rows=draw(st.integers(0, 4)),
        columns=columns,
        k=draw(st.integers(0, 8) | st.sampled_from(_KS)),
        gap=draw(st.integers(0, 9)),
        dtype=draw(st.sampled_from(dtypes)),
        first_id=draw(st.sampled_from([0, 40, 100_000, max_columns(on_gpu) - columns])),
        ids=draw(st.sampled_from(["near", "near", "far", "repeated"])),
        logits=draw(st.sampled_from(["plain", "plain", "plain", "nan", "inf", "masked"])),
        options=options,
    )


def max_columns(on_gpu: bool) -> int:
    """Return the largest value of first_id plus the columns of a chunk."""
    return 1 << 28 if on_gpu else _INT64.max


def small_problem(selects: bool) -> Problem:
    """Return a problem with every optional tensor, whose sizes are all different."""
    options = {
        "softcap": 3.0, "scale": 1.0, "temperature": 0.5, "beta": 0.3, "before": 0,
        "out": torch.bfloat16, "bias": True, "entropy": True, "selects": selects,
        "upstream": True, "block_per_row": False,
    }  # fmt: skip
    return Problem(0, 3, 9, 4, 2, torch.float32, 0, "near", "plain", options)

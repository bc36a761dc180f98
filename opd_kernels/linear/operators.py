"""The two differentiable operators of a head, as PyTorch custom ops, and the logits they act on.

`linear_topk` selects the K largest logits of a row while it computes the logsumexp of the rest;
`linear_gather` takes the ids as given. Both return SparseLogits' three tensors, and the backward
pass of both is `linear_backward`. Operands here are two-dimensional and checked: users call the
operators through LazyLogits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn import functional

from opd_kernels.backends import select_backend
from opd_kernels.backends.records import Head, Operands, RowGradient, RowState, accumulator_dtype
from opd_kernels.derivatives import refuse_second_backward
from opd_kernels.linear.pages import PagedTensor
from opd_kernels.linear.products import operand_dtype
from opd_kernels.linear.sparse import add_sparse_gradients, gather_logits
from opd_kernels.linear.vocabulary_walk import backpropagate, reduce_logits
from opd_kernels.parallel import VocabShard
from opd_kernels.sparse_logits import SparseLogits, canonical_ids, derived, trusted


@dataclass(frozen=True)
class FlatLogits(Operands):
    """LazyLogits after its checks, with hidden as [N, D].

    Where a head is vocabulary-parallel, `head` holds this rank's rows, and `vocab_size` counts the
    tokens of all ranks.
    """

    vocab_size: int
    shard: VocabShard | None = None

    @classmethod
    def flatten(cls, hidden: Tensor, head: Head) -> "FlatLogits":
        """Flatten hidden [..., D] to [N, D]; under autocast cast all operands to its dtype.

        The vocab_size of the head counts the tokens of all ranks. Call `split` next if there are
        ranks.
        """
        hidden = hidden.reshape(-1, hidden.shape[-1])
        device_type = hidden.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            if accumulator_dtype(hidden, head.weight) != torch.float64:
                bias = None if head.bias is None else head.bias.to(dtype)
                hidden, head = (
                    hidden.to(dtype),
                    replace(head, weight=head.weight.to(dtype), bias=bias),
                )
        return cls(hidden, head, head.vocab_size)

    def split(self, shard: VocabShard, whole: bool) -> "FlatLogits":
        """The logits of this rank of a vocabulary-parallel head; dhidden is summed over the ranks.

        Args:
            shard: which rows of the head each rank has.
            whole: whether the head has the rows of all ranks and is to be cut to this rank's.
        """
        head, rows = self.head, shard.rows(self.vocab_size)
        weight, bias, size = head.weight, head.bias, rows.stop - rows.start
        if whole:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if size == 0:
            # An empty rank holds one dummy row at -inf, so that its weight and bias still receive
            # a gradient, as on the other ranks.
            nothing = weight.new_zeros(0) if bias is None else bias[:0]
            bias = functional.pad(nothing, (0, 1), value=-torch.inf)
            weight = functional.pad(weight[:0], (0, 0, 0, 1))
            head, size = replace(head, softcap=None, scale=1.0), 1
        head = replace(head, weight=weight, bias=bias, vocab_size=size)
        return FlatLogits(shard.sum_gradient(self.hidden), head, self.vocab_size, shard)

    def __getitem__(self, rows: Any) -> "FlatLogits":
        part = super().__getitem__(rows)
        return FlatLogits(part.hidden, part.head, self.vocab_size, self.shard)

    def topk(
        self, k: int, entropy: bool = False, chunk_bytes: int | None = None, backend: str = "auto"
    ) -> SparseLogits:
        """See LazyLogits.topk."""
        options = (min(k, self.head.vocab_size), entropy, chunk_bytes, backend)
        values, ids, tail, row_entropy = linear_topk(self.hidden, *self.head.flat(), *options)
        return self.merged(self.sparse(values, ids, tail, row_entropy if entropy else None), k)

    def gather(
        self,
        ids: Tensor,
        entropy: bool = False,
        chunk_bytes: int | None = None,
        backend: str = "auto",
        tail: bool = True,
    ) -> SparseLogits:
        """See LazyLogits.gather; ids are [N, K]."""
        options = (self.local_ids(ids), tail, entropy, chunk_bytes, backend)
        values, row_tail, row_entropy = linear_gather(self.hidden, *self.head.flat(), *options)
        rows = self.sparse(
            values, ids, row_tail if tail else None, row_entropy if entropy else None
        )
        return self.merged(rows, ids)

    def sparse(
        self, values: Tensor, ids: Tensor, tail: Tensor | None, entropy: Tensor | None
    ) -> SparseLogits:
        """SparseLogits of this rank's rows; entropy gets no gradient."""
        entropy = None if entropy is None else entropy.detach()
        temperature = self.head.temperature
        return trusted(values, ids, tail, self.vocab_size, temperature, entropy)

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids of the vocabulary as rows of this rank's head."""
        return ids if self.shard is None else self.shard.local_ids(ids, self.vocab_size)

    @property
    def planned_columns(self) -> int:
        """The columns by which chunks are planned: all ranks have to walk the same chunks."""
        return self.vocab_size if self.shard is None else self.shard.largest

    def detach(self) -> "FlatLogits":
        """The same logits without gradient."""
        return FlatLogits(self.hidden.detach(), self.head.detach(), self.vocab_size, self.shard)

    def merged(self, rows: SparseLogits, wanted: int | Tensor) -> SparseLogits:
        """Combine the SparseLogits of all ranks: the top-K for wanted = K, or at wanted = ids."""
        if isinstance(wanted, Tensor):
            if self.shard is not None:
                return self.shard.merge_given(rows, wanted, self.vocab_size)
            return rows if rows.ids is wanted else derived(rows, ids=wanted)
        return rows if self.shard is None else self.shard.merge_topk(rows, wanted, self.vocab_size)


def _linear_topk(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [N, K], ids [N, K], tail [N] and entropy [N] (or [0]) of hidden [N, D]."""
    head, (k, entropy, chunk_bytes, backend) = Head.unpack(arguments)
    like = hidden.new_empty(0, dtype=accumulator_dtype(hidden, head.weight))
    state = RowState.for_topk(hidden.shape[0], k, entropy, like)
    _reduce(hidden, head, state, chunk_bytes, backend)
    return state.values, state.ids, state.tail(), state.entropy() if entropy else like


def _linear_gather(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, K], tail [N] (or [0]) and entropy [N] (or [0]) of hidden [N, D] at ids [N, K]."""
    head, (ids, tail, entropy, chunk_bytes, backend) = Head.unpack(arguments)
    ids = canonical_ids(ids, head.vocab_size)
    like = hidden.new_empty(0, dtype=accumulator_dtype(hidden, head.weight))
    if not tail:
        return gather_logits(Operands(hidden.to(like.dtype), head), ids), like, like.clone()
    state = RowState.for_ids(ids, entropy, like)
    _reduce(hidden, head, state, chunk_bytes, backend)
    return state.values, state.tail(), state.entropy() if entropy else like


def _reduce(
    hidden: Tensor, head: Head, state: RowState, chunk_bytes: int | None, backend: str
) -> None:
    operands = Operands(hidden.to(operand_dtype(hidden, head.weight)), head)
    reduce_logits(operands, state, select_backend(backend, hidden.device), chunk_bytes)


def _linear_backward(
    dvalues: Tensor | None, dtail: Tensor | None, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden [N, D], dweight [V, D] and dbias [V], each [0] where it is not needed.

    Without dtail there is no pass over the vocabulary. The absence of the gradient decides that,
    never its values, so that the host does not wait for the device.
    """
    head, (ids, values, tail, needs, chunk_bytes, backend) = Head.unpack(arguments)
    ids, dtype = canonical_ids(ids, head.vocab_size), values.dtype
    weight, bias = head.weight, head.bias
    dhidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    # In 16 bits a sum over tokens would round at every addition. With dtail the walk sums each row
    # block in float32 and rounds it once.
    dweight_dtype = dtype if dtail is None else weight.dtype
    paged = PagedTensor.zeros_like(weight, dweight_dtype) if needs[1] else None
    dbias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
    sums = (dhidden, None if paged is None else paged.tensor, dbias)
    epilogues = select_backend(backend, hidden.device)
    if dvalues is None:
        dvalues = torch.zeros_like(values)
    if dtail is None:
        operands = Operands(hidden.to(dtype), head)
        add_sparse_gradients(operands, ids, values, dvalues, sums, epilogues)
    else:
        operands = Operands(hidden.to(operand_dtype(hidden, weight)), head)
        gradient = RowGradient(ids, dvalues, tail, dtail)
        backpropagate(operands, gradient, sums, epilogues, chunk_bytes)
    nothing = hidden.new_empty(0)
    return (
        nothing if dhidden is None else dhidden.to(hidden.dtype),
        nothing.clone() if paged is None else paged.rounded(weight.dtype),
        nothing.clone() if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _fake_topk(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head, (k, entropy, _, _) = Head.unpack(arguments)
    tokens, dtype = hidden.shape[0], accumulator_dtype(hidden, head.weight)
    values = hidden.new_empty((tokens, k), dtype=dtype)
    ids = hidden.new_empty((tokens, k), dtype=torch.int64)
    rows = hidden.new_empty(tokens, dtype=dtype)
    return values, ids, rows, hidden.new_empty(tokens if entropy else 0, dtype=dtype)


def _fake_gather(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    head, (ids, tail, entropy, _, _) = Head.unpack(arguments)
    tokens, dtype = hidden.shape[0], accumulator_dtype(hidden, head.weight)
    values = hidden.new_empty(ids.shape, dtype=dtype)
    rows = hidden.new_empty(tokens if tail else 0, dtype=dtype)
    return values, rows, hidden.new_empty(tokens if tail and entropy else 0, dtype=dtype)


def _fake_backward(
    dvalues: Tensor | None, dtail: Tensor | None, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    head, (_, _, _, needs, _, _) = Head.unpack(arguments)
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(head.weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(head.bias) if needs[2] and head.bias is not None else hidden.new_empty(0),
    )


def _save(ctx: Any, hidden: Tensor, head: Head, *tensors: Tensor) -> None:
    """Keep what linear_backward takes: hidden, head, ids, values and tail."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, *tensors, *head.tensors)
    ctx.scalars = head.scalars


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, (_, _, *ctx.execution) = Head.unpack(inputs[1:])
    values, ids, tail, _ = output
    _save(ctx, inputs[0], head, ids, values, tail)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, (ids, _, _, *ctx.execution) = Head.unpack(inputs[1:])
    values, tail, _ = output
    _save(ctx, inputs[0], head, ids, values, tail)


def _backward(ctx: Any, dvalues: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """Backward of both operators. Their last outputs are tail and entropy: others[-2] is dtail."""
    dtail = others[-2]
    hidden, ids, values, tail, *tensors = ctx.saved_tensors
    if tail.numel() == 0:
        dtail = None  # gather(tail=False) has no tail, nor has an empty batch
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_backward(
        dvalues, dtail, hidden, *tensors, *ctx.scalars, ids, values, tail, needs, *ctx.execution
    )
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * (len(ctx.needs_input_grad) - len(needs)))


def _register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:
    """Define an operator of this package for every device, without autocast."""
    hidden = schema.split("Tensor hidden")[0].count(",")  # its position among the arguments
    disabled = cache(lambda: torch._dynamo.disable(implementation))

    @wraps(implementation)
    def run(*arguments: Any) -> Any:
        # A compiler that has skipped the caller would trace into the implementation: a loop of
        # operators took 12 graphs and 11 s to compile instead of 4 graphs and 6 s.
        is_traced = get_eval_frame_callback() is not None
        function = disabled() if is_traced else implementation
        device_type = arguments[hidden].device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return function(*arguments)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments)

    qualified = f"opd_kernels::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)


_FORWARD = f"(Tensor hidden, {Head.SCHEMA}"
_OPTIONS = "bool entropy, SymInt? chunk_bytes, str backend)"
if not hasattr(torch.ops.opd_kernels, "linear_topk"):  # a second import keeps the first operators
    _register(
        "linear_topk",
        f"{_FORWARD}, SymInt k, {_OPTIONS} -> (Tensor, Tensor, Tensor, Tensor)",
        _linear_topk, _fake_topk, _backward, _save_topk,
    )  # fmt: skip
    _register(
        "linear_gather",
        f"{_FORWARD}, Tensor ids, bool tail, {_OPTIONS} -> (Tensor, Tensor, Tensor)",
        _linear_gather, _fake_gather, _backward, _save_gather,
    )  # fmt: skip
    _register(
        "linear_backward",
        f"(Tensor? dvalues, Tensor? dtail, Tensor hidden, {Head.SCHEMA}, Tensor ids, "
        "Tensor values, Tensor tail, bool[] needs, SymInt? chunk_bytes, str backend) "
        "-> (Tensor, Tensor, Tensor)",
        _linear_backward, _fake_backward, refuse_second_backward, None,
    )  # fmt: skip
linear_topk = torch.ops.opd_kernels.linear_topk.default
linear_gather = torch.ops.opd_kernels.linear_gather.default
linear_backward = torch.ops.opd_kernels.linear_backward.default

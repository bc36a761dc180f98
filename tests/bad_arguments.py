"""Wrong values of every parameter of the public functions, methods and constructors."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_kernels import (
    LazyLogits,
    SparseLogits,
    TopKDistillationLoss,
    VocabShard,
    backends,
    distillation_loss,
    forward_kl,
    jsd,
    memory,
    parallel,
    policy_gradient,
    reverse_kl,
)

NAN, INF = float("nan"), float("inf")
FLAG = ("yes", 1, None, torch.ones(()))
NUMBER = ("1", None, True, 1j, torch.ones(()), NAN, INF)
INT = ("5", 5.0, True, None, torch.ones((), dtype=torch.long))
CHUNK_BYTES = ("1", 1.5, True, 0, -1)
BACKEND = ("cuda13", None, 3)


@dataclass(frozen=True)
class Reported:
    """A wrong value whose error names another argument, or a field of SparseLogits: `by`."""

    by: str
    value: Any


@dataclass(frozen=True)
class Case:
    """A public callable, valid arguments, wrong values by parameter, and reasons why the remaining
    parameters accept any value.
    """

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    bad: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)


def ints(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, **options)


def floats(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, 0.5, **options)


def tensors(*shape: int) -> tuple[Any, ...]:
    """Return values that are not a floating-point tensor of a shape on the CPU."""
    wrong = (ints(*shape), floats(*shape).bool(), floats(*shape, dtype=torch.complex64))
    return (None, "x", [[0.5]], 3.0, *wrong, floats(*shape, device="meta"))


def ids(*shape: int) -> tuple[Any, ...]:
    """Return values that are not a tensor of ids of a shape on the CPU."""
    wrong = (floats(*shape), ints(*shape).bool(), floats(*shape, dtype=torch.complex64))
    return (None, "x", [[1]], 3, *wrong, ints(*shape, device="meta"), ints(*shape, 1))


def lazy(tokens: tuple[int, ...] = (2, 3), dim: int = 8, vocab: int = 20, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(dim)
    hidden = torch.randn(*tokens, dim, generator=generator)
    return LazyLogits(hidden, torch.randn(vocab, dim, generator=generator), **options)


def sparse(tokens: tuple[int, ...] = (2, 3), k: int = 4, **changes: Any) -> Any:
    values = floats(*tokens, k)
    fields = {"ids": torch.arange(k).expand(*tokens, k), "tail": floats(*tokens), "vocab_size": 20}
    return SparseLogits(**{"values": values} | fields | changes)


def on_meta(logits: LazyLogits) -> LazyLogits:
    return LazyLogits(logits.hidden.to("meta"), logits.weight.to("meta"))


def pair(k: int = 4) -> dict[str, Any]:
    return {"student": sparse(k=k), "teacher": sparse(k=k)}


NO_LOGITS = (None, "x", floats(2, 3, 20))
PAIR = {
    "student": (
        *NO_LOGITS, lazy(), Reported("teacher", sparse(k=3)), Reported("teacher", sparse((2,))),
    ),
    "teacher": (
        *NO_LOGITS, lazy(), sparse(k=3), sparse((3, 2)), sparse(ids=ints(2, 3, 4) + 1),
        Reported("vocab_size", sparse(vocab_size=21)),
        Reported("temperature", sparse(temperature=2.0)),
        sparse(values=floats(2, 3, 4, device="meta"), ids=ints(2, 3, 4, device="meta"),
               tail=floats(2, 3, device="meta")),
    ),
    "tail": ("mean", None, True, 3, torch.ones(())),
}  # fmt: skip
LOSS = {
    "k": (*INT, 0, -1, 21),
    "support": ("top", None, 3, [1, 2],
                Reported("ids", floats(2, 3, 2)), Reported("ids", ints(3, 2)),
                Reported("ids", ints(2, 3, 0)), Reported("ids", ints(2, 3, 2, device="meta"))),
    "objective": ("reverse_kl", None, lambda s, t: 1.0, lambda s, t: reverse_kl(s, t).mean(),
                  lambda s, t: s.ids.sum(-1)),
    "reduction": ("avg", None, True, 3),
    "method": ("fast", None, 3),
    "missing": ("fill", None, 3),
    "entropy": FLAG, "compact": FLAG, "chunk_bytes": CHUNK_BYTES, "backend": BACKEND,
    "gradient_filter": ("1", True, 0.0, 1.0, -0.1, NAN, 1, torch.ones(())),
}  # fmt: skip
MODELS = {
    "student": (*NO_LOGITS, sparse(), Reported("teacher", lazy((3,)))),
    "teacher": (
        *NO_LOGITS, lazy((3, 2)), lazy((6,)), sparse((6,)), on_meta(lazy()),
        Reported("vocab_size", sparse(vocab_size=21)),
        Reported("temperature", lazy(temperature=2.0)),
    ),
    "token_weights": ("x", [1.0] * 6, 1.0, floats(6), floats(2, 3, dtype=torch.complex64),
                      floats(2, 3, device="meta")),
    "denominator": ("4", True, NAN, INF, -1, 1j, floats(2, 3), floats(1, dtype=torch.complex64),
                    floats(1, device="meta")),
}  # fmt: skip


def loss_of(**changes: Any) -> Any:
    return distillation_loss(**{"student": lazy(), "teacher": lazy(dim=5), "k": 4} | changes)


def both() -> dict[str, Any]:
    return {"student": lazy(), "teacher": lazy(dim=5)}


CASES = {
    "LazyLogits": Case(
        LazyLogits,
        lambda: {"hidden": floats(2, 3, 8), "weight": floats(20, 8)},
        {
            "hidden": (*tensors(2, 3, 8)[:-1], Reported("weight", floats(2, 3, 8, device="meta")),
                       floats(2, 3, 7), floats()),
            "weight": (*tensors(20, 8), floats(20), floats(8, 20), floats(20, 0)),
            "bias": (*tensors(20)[1:], floats(19), floats(20, 1)),
            "softcap": (*(x for x in NUMBER if x is not None), 0.0, -1.0),
            "scale": NUMBER,
            "temperature": (*NUMBER, 0.0, -1.0),
            "vocab_size": (*(x for x in INT if x is not None), 0, -1, 21),
            "shard": ("x", 2, (0, 20)),
            "check_finite": FLAG,
        },
    ),
    "LazyLogits.__getitem__": Case(
        lambda index: lazy()[index], lambda: {"index": 0},
        {"index": ("x", 1.5, 2, (0, 0, 0), (..., 3), floats(2), torch.ones(3).bool(),
                   torch.ones(2, 3, 8).bool(), ints(1) + 2)},
    ),
    "LazyLogits.topk": Case(
        lambda **o: lazy().topk(**o), lambda: {"k": 2},
        {"k": (*INT, 0, -1, 21), "entropy": FLAG, "chunk_bytes": CHUNK_BYTES, "backend": BACKEND},
    ),
    "LazyLogits.gather": Case(
        lambda **o: lazy().gather(**{"ids": ints(2, 3, 1)} | o), lambda: {"ids": ints(2, 3, 1)},
        {"ids": (*ids(2, 3, 1), ints(2, 3), ints(2, 3, 0)), "tail": FLAG, "entropy": FLAG,
         "chunk_bytes": CHUNK_BYTES, "backend": BACKEND},
    ),
    "LazyLogits.log_prob": Case(
        lambda **o: lazy().log_prob(**{"targets": ints(2, 3)} | o), lambda: {},
        {"targets": (*ids(2, 3), ints(6)), "ignore_index": INT, "chunk_bytes": CHUNK_BYTES,
         "backend": BACKEND},
    ),
    "LazyLogits.detach": Case(lambda: lazy().detach(), dict),
    "LazyLogits.materialize": Case(lambda: lazy().materialize(), dict),
    "SparseLogits": Case(
        sparse, dict,
        {
            "values": (*tensors(2, 3, 4)[:-1], Reported("ids", floats(2, 3, 4, device="meta")),
                       floats()),
            "ids": (*ids(2, 3, 4), ints(2, 3, 3)),
            "tail": (*tensors(2, 3)[1:], floats(2, 3, 1), floats(3)),
            "vocab_size": (*INT, 0, -1),
            "temperature": (*NUMBER, 0.0, -1.0),
            "entropy": (*tensors(2, 3)[1:], floats(2, 3, 1), floats(3)),
        },
    ),
    "SparseLogits.from_log_probs": Case(
        lambda **o: SparseLogits.from_log_probs(
            **{"log_probs": floats(2, 3, 4) - 5, "ids": ints(2, 3, 4), "vocab_size": 20} | o
        ), dict,
        {
            "log_probs": (*tensors(2, 3, 4)[:-1], Reported("ids", floats(2, 3, 4, device="meta")),
                          floats(2, 3, 4), floats(2, 3, 4) * NAN, Reported("ids", floats()),
                          Reported("ids", floats(2, 3, 5) - 5)),
            "ids": (*ids(2, 3, 4), ints(2, 3, 3)),
            "vocab_size": (*INT, 0, -1),
            "temperature": (*NUMBER, 0.0, -1.0),
        },
    ),
    "SparseLogits.overlap": Case(
        lambda other: sparse().overlap(other), lambda: {"other": sparse()},
        {"other": (*NO_LOGITS, lazy(), sparse((6,)), sparse((3, 2)))},
    ),
    "SparseLogits.at": Case(
        lambda ids: sparse().at(ids), lambda: {"ids": ints(2, 3, 1)},
        {"ids": (*ids(2, 3, 1), ints(2, 3), ints(6, 1), ints(2, 3, 0))},
    ),
    "SparseLogits.keep": Case(
        lambda mask: sparse().keep(mask), lambda: {"mask": ints(2, 3, 4).bool()},
        {"mask": (None, "x", True, [[True]], floats(2, 3, 4), ints(2, 3, 4), ints(2, 3, 3).bool(),
                  ints(2, 3, 4, device="meta").bool())},
    ),
    "SparseLogits.detach": Case(lambda: sparse().detach(), dict),
    "SparseLogits.topk": Case(
        lambda k: sparse().topk(k), lambda: {"k": 1}, {"k": (*INT, 0, -1)},
    ),
    "SparseLogits.map": Case(
        lambda function: sparse().map(function), lambda: {"function": lambda x: x[0]},
        {"function": (None, "x", Reported("values", lambda x: 3),
                      Reported("values", lambda x: x.bool()))},
    ),
    "distillation_loss": Case(loss_of, dict, MODELS | LOSS),
    "TopKDistillationLoss": Case(
        lambda **o: TopKDistillationLoss(**{"k": 4} | o)(**both()), dict,
        LOSS | {"support": LOSS["support"][:4]},
    ),
    "TopKDistillationLoss.forward": Case(
        lambda **o: TopKDistillationLoss(k=4)(**both() | o), dict, MODELS
    ),
    "reverse_kl": Case(
        lambda **o: reverse_kl(**pair() | o), dict, PAIR | {"stop_gradient": FLAG}
    ),
    "forward_kl": Case(lambda **o: forward_kl(**pair() | o), dict, PAIR),
    "jsd": Case(
        lambda **o: jsd(**pair() | o), dict, PAIR | {"beta": (*NUMBER, -0.1, 1.1)}
    ),
    "policy_gradient": Case(
        lambda **o: policy_gradient(**pair(1) | o), dict,
        {"student": (*NO_LOGITS, sparse(k=4)), "teacher": (*NO_LOGITS, sparse(k=4))},
    ),
    "DistillationOutput": Case(
        lambda: loss_of(), dict,
        right=dict.fromkeys(("loss", "per_token", "student", "teacher", "dropped"),
                            "results, which the package makes"),
    ),
    "VocabShard": Case(
        lambda **o: VocabShard(**{"group": torch.distributed.group.WORLD, "starts": (0, 20)} | o),
        dict,
        {"group": (None, "x", 3), "starts": (None, "x", 3, (), (0,), (0, 5, 9), (1, 20), (0, -1),
                                             (0, 2.0), [0, 20])},
    ),
    "VocabShard.from_weight": Case(
        lambda **o: VocabShard.from_weight(**{"weight": floats(20, 8)} | o), dict,
        {"weight": (None, "x", [[1.0]], floats()), "group": ("x", 3)},
    ),
    "VocabShard.same_split_as": Case(
        lambda other: shard().same_split_as(other), lambda: {"other": shard()},
        {"other": (None, "x", (0, 20))},
    ),
    "VocabShard.rows": Case(
        lambda vocab_size: shard().rows(vocab_size), lambda: {"vocab_size": 20},
        {"vocab_size": (*INT, -1)},
    ),
    "available_backends": Case(backends.available_backends, dict),
    "backends.select_backend": Case(
        backends.select_backend, lambda: {"name": "auto", "device": torch.device("cpu")},
        {"name": tuple(Reported("backend", x) for x in (*BACKEND, ["torch"])),
         "device": (None, "cpu", 0)},
    ),
    "parallel.shard_of_dtensor": Case(
        parallel.shard_of_dtensor, lambda: {"weight": dtensor()},
        {"weight": (None, "x", floats(20, 8))},
    ),
    "memory.Loss": Case(
        lambda **o: memory.Loss(**{"tokens": 8, "dim": 4, "vocab": 20} | o), dict,
        {name: (*INT, 0, -1) for name in ("tokens", "dim", "vocab", "k", "ranks")}
        | {"dtype": ("bfloat16", None, torch.int8), "device": ("cuda", None, 3),
           "chunk_bytes": CHUNK_BYTES},
    ),
    "memory.table": Case(
        memory.table, lambda: {"loss": memory.Loss(8, 4, 20)}, {"loss": (None, "x", {"tokens": 8})}
    ),
    "memory.read_config": Case(
        memory.read_config, lambda: {"path": config_file()},
        {"path": (None, 3, Path("nowhere"), Path(__file__))},
    ),
}  # fmt: skip


def shard() -> VocabShard:
    return VocabShard.from_weight(floats(20, 8))


def dtensor() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    return distribute_tensor(floats(20, 8), mesh, [Shard(0)])


def config_file() -> Path:
    """Write a model's config.json to a new directory."""
    path = Path(tempfile.mkdtemp()) / "config.json"
    path.write_text('{"hidden_size": 8, "vocab_size": 20}')
    return path

"""Memory of a loss beyond the models: `python -m opd_kernels.memory --model-config DIR`.

Eager code holds whole float32 tensors [N, V]. At its peak it has five of them for the full reverse
KL of two models (both log-probabilities, the student's probabilities, the log-ratio and their
product), and four for the top-K loss (both logits and two temporaries of a logsumexp). This package
holds chunks of logits, sized as in linear/plan.py, and float32 sums of gradients that are returned
in another dtype. Communication of a vocabulary-parallel head is the number of bytes that one rank
sends, with all-reduces as rings.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_kernels.checks import FLOATING, check_execution, check_int, got
from opd_kernels.linear.cost_model import GPUS, Machine, Shape
from opd_kernels.linear.plan import budget_of, recompute_chunks, rows_within
from opd_kernels.linear.products import SLICE_ROWS

MIB = 1 << 20


@dataclass(frozen=True)
class Loss:
    """The sizes of a distillation loss: a student's and a teacher's head on the same tokens.

    Attributes:
        tokens: number of tokens N.
        dim: hidden size D of the student.
        vocab: vocabulary size V.
        k: size K of the support.
        dtype: dtype of hidden states and weights.
        device: "cpu", or the name of a GPU in cost_model.GPUS.
        ranks: number of ranks that share the rows of the head.
        chunk_bytes: same as in distillation_loss.
    """

    tokens: int
    dim: int
    vocab: int
    k: int = 20
    dtype: torch.dtype = torch.bfloat16
    device: str = "H100"
    ranks: int = 1
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "dim", "vocab", "k", "ranks"):
            check_int(name, getattr(self, name), 1)
        if self.dtype not in FLOATING:
            raise TypeError(f"dtype: expected one of {FLOATING}, got {self.dtype!r}")
        if self.device not in ("cpu", *GPUS):
            raise ValueError(f"device: expected one of {('cpu', *GPUS)}, got {self.device!r}")
        check_execution(self.chunk_bytes, "auto")

    @property
    def rows(self) -> int:
        """Number of the weight's rows on the rank that has the most."""
        return -(-self.vocab // self.ranks)

    @property
    def shape(self) -> Shape:
        """The student's head in the cost model. A CPU multiplies 16-bit operands in float32."""
        operand = torch.float32 if self.device == "cpu" else self.dtype
        return Shape(self.tokens, self.dim, self.rows, self.k, operand_bytes=operand.itemsize)

    @property
    def budget(self) -> int:
        """Maximum bytes of logits that are held at a time."""
        device = torch.device("cpu" if self.device == "cpu" else "cuda")
        return budget_of(device, self.chunk_bytes)

    def eager(self, full: bool) -> int:
        """Peak bytes of eager PyTorch, which it reaches in the forward pass."""
        return (5 if full else 4) * self.tokens * self.vocab * 4

    def one_pass(self, full: bool = False) -> int:
        """Peak bytes of the one-pass order: a chunk of tokens [c, V], for support="full" one of
        each model, and the gradients' float32 sums.
        """
        width = self.shape.bytes_per_logit
        rows = rows_within(self.tokens, self.rows, self.budget // width)
        chunks = rows * self.rows * (width + 4 * full)
        sums = self.sums(self.tokens)
        if self.device == "cpu":
            # The 16-bit dweight is returned in the first half of its sum's memory.
            sums += self.sums(self.rows) // 2
        elif rows < self.tokens or self.dtype != torch.bfloat16:
            # A single chunk writes a bf16 dweight directly and needs no sum.
            sums += self.sums(self.rows)
        return chunks + sums + self.upcast() + self.supports()

    def sums(self, rows: int) -> int:
        """Bytes of a float32 sum [rows, D] of gradients that are returned in 16 bits, else 0."""
        return 0 if self.dtype.itemsize >= 4 else rows * self.dim * 4

    def upcast(self) -> int:
        """Bytes of the float32 copies that 16 CPU threads make of slices of a 16-bit weight; 0 on
        a GPU.
        """
        upcasts = self.device == "cpu" and self.dtype.itemsize < 4
        return min(16 * SLICE_ROWS, self.rows) * self.dim * 4 if upcasts else 0

    def recompute(self) -> int:
        """Peak bytes of the recompute order: a chunk of the vocabulary [n, v], and the float32
        sums of dhidden and of one chunk's dweight.
        """
        machine = Machine.for_device(torch.device("cpu"), self.shape.operand_bytes)
        if self.device != "cpu":
            machine = GPUS[self.device].machine(self.shape.operand_bytes)
        _, (rows, columns) = recompute_chunks(self.shape, machine, self.budget, fused=False)
        sums = self.sums(self.tokens + columns) + self.upcast()
        return rows * columns * self.shape.bytes_per_logit + sums + self.supports()

    def supports(self) -> int:
        """Bytes of values, ids and gradients on S of both models, and of six scalars per row."""
        return self.tokens * (2 * self.k * (4 + 8 + 4) + 2 * 6 * 4)

    def exchanged(self, full: bool = False) -> dict[str, int]:
        """Bytes that a rank sends, by purpose; all 0 for a single rank."""
        others, share = self.ranks - 1, (self.ranks - 1) / self.ranks
        ring = int(2 * share * self.tokens * 4)  # an all-reduce of one float32 per token
        result = {
            "top-K values and tails": others * self.tokens * (self.k + 1) * 4,
            "top-K ids": others * self.tokens * self.k * 8,
            "teacher's values and tails": others * self.tokens * (self.k + 1) * 4,
            "sum of dhidden": ring * self.dim,
        }
        if full:
            result["losses of the ranks' rows"] = 2 * ring
        return result

    def head(self) -> int:
        """Bytes of the student's weight on the rank that has the most rows."""
        return self.rows * self.dim * self.dtype.itemsize

    def exchanged_for_weights(self) -> dict[str, int]:
        """Bytes that a rank sends for the student's head under FSDP2, where every rank has its own
        tokens: one gather of the weight and one reduction of its gradient per step, both as rings.
        """
        share = (self.ranks - 1) / self.ranks
        size = share * self.vocab * self.dim * self.dtype.itemsize
        return {"gather of the weight": int(size), "reduction of its gradient": int(size)}


def table(loss: Loss) -> str:
    """Return Markdown tables of the peaks of eager code and of this package, and of the bytes that
    a rank sends.
    """
    if not isinstance(loss, Loss):
        raise TypeError(f"loss: expected a memory.Loss, got {got(loss)}")
    peaks = {
        "eager, full vocabulary": loss.eager(True),
        "eager, top-K": loss.eager(False),
        "one_pass": loss.one_pass(),
        'support="full"': loss.one_pass(True),
        "recompute": loss.recompute(),
    }
    lines = ["| beyond models and returned gradients | MiB |", "|---|---|"]
    lines += [f"| {name} | {size / MIB:,.0f} |" for name, size in peaks.items()]
    if loss.ranks > 1:
        lines += ["", f"| a rank of {loss.ranks} sends | MiB |", "|---|---|"]
        exchanged = loss.exchanged()
        exchanged["in all"] = sum(exchanged.values())
        lines += [f"| {name} | {size / MIB:,.1f} |" for name, size in exchanged.items()]
    return "\n".join(lines)


def ranks_table(losses: list[Loss]) -> str:
    """Return a Markdown table with one row per loss: MiB that a rank holds and sends when a head is
    split over ranks. The last column is for FSDP2 instead, with N different tokens on every rank.
    """
    names = ("head", "one_pass", "recompute", "sends", "top-K part", "sends under FSDP2")
    lines = [f"| ranks | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for loss in losses:
        exchanged = loss.exchanged()
        small = sum(exchanged.values()) - exchanged["sum of dhidden"]
        sizes = [loss.head(), loss.one_pass(), loss.recompute(), sum(exchanged.values()), small]
        sizes.append(sum(loss.exchanged_for_weights().values()))
        cells = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
        lines.append(f"| {loss.ranks} | {cells} |")
    return "\n".join(lines)


def read_config(path: Path) -> tuple[int, int]:
    """Return D and V from a model's config.json; path is the file or its directory."""
    if not isinstance(path, Path):
        raise TypeError(f"path: expected a pathlib.Path, got {got(path)}")
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path: expected a model's config.json or its directory, got {path} ({error})"
        ) from error
    config = config.get("text_config", config)
    missing = [name for name in ("hidden_size", "vocab_size") if name not in config]
    if missing:
        raise SystemExit(
            f"--model-config: {file} has no {', '.join(missing)}; pass --dim and --vocab"
        )
    return config["hidden_size"], config["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m opd_kernels.memory", description=__doc__)
    parser.add_argument("--model-config", type=Path, help="a model's config.json or its directory")
    parser.add_argument("--dim", type=int, help="hidden size of the student")
    parser.add_argument("--vocab", type=int, help="vocabulary size")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--k", type=int, default=20, help="size of the support")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", *GPUS], default="H100")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1], help="ranks that share a vocab-parallel head"
    )
    parser.add_argument("--chunk-bytes", type=int, help="same as in distillation_loss")
    args = parser.parse_args()
    dim, vocab = args.dim, args.vocab
    if args.model_config is not None:
        dim, vocab = read_config(args.model_config)
    if dim is None or vocab is None:
        parser.error("pass --model-config, or --dim and --vocab")
    dtype, sizes = getattr(torch, args.dtype), (args.tokens, dim, vocab, args.k)
    losses = [Loss(*sizes, dtype, args.device, n, args.chunk_bytes) for n in args.ranks]
    print(f"N = {args.tokens:,}, D = {dim:,}, V = {vocab:,}, K = {args.k}, {args.dtype}\n")
    print(table(losses[0]) if len(losses) == 1 else f"MiB:\n\n{ranks_table(losses)}")


if __name__ == "__main__":
    main()

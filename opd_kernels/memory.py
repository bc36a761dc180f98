"""What a loss needs beyond the models, in bytes: `python -m opd_kernels.memory --model-config DIR`.

Eager code holds whole tensors [N, V] in float32: five at its peak for the full reverse KL of two
models (both log-probabilities, the student's probability, the log-ratio and their product), four
for the top-K (both logits, and two in a logsumexp). This package holds chunks, by the plan of the
walk itself, and the sums of gradients that are returned in another dtype. What the ranks of a
vocabulary-parallel head exchange is counted in bytes that one sends, with all-reduces as rings.
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
    """Two heads on the same tokens.

    Attributes:
        tokens: N.
        dim: D of the student.
        vocab: V.
        k: size of the support.
        dtype: of hidden states and weights.
        device: "cpu", or a GPU of cost_model.GPUS.
        ranks: over which the head is split by rows.
        chunk_bytes: as distillation_loss takes it.
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
        """Of the weight, on the rank that has most."""
        return -(-self.vocab // self.ranks)

    @property
    def shape(self) -> Shape:
        """As the cost model sees the student's head; a CPU upcasts 16 bits, slice by slice."""
        operand = torch.float32 if self.device == "cpu" else self.dtype
        return Shape(self.tokens, self.dim, self.rows, self.k, operand_bytes=operand.itemsize)

    @property
    def budget(self) -> int:
        """Bytes of logits that may live at a time."""
        kind = torch.device("cpu" if self.device == "cpu" else "cuda")
        return budget_of(kind, self.chunk_bytes)

    def eager(self, full: bool) -> int:
        """Peak of whole float32 tensors, in the forward pass."""
        return (5 if full else 4) * self.tokens * self.vocab * 4

    def one_pass(self, full: bool = False) -> int:
        """Chunks of tokens [c, V], of both models for support="full", and the gradients' sums."""
        width = self.shape.bytes_a_logit
        rows = rows_within(self.tokens, self.rows, self.budget // width)
        chunks = rows * self.rows * (width + 4 * full)
        sums = self.sums(self.tokens)
        if self.device == "cpu":  # where dweight is returned in the memory of its sum
            sums += self.sums(self.rows) // 2
        elif rows < self.tokens or self.dtype != torch.bfloat16:  # else it is no sum
            sums += self.sums(self.rows)
        return chunks + sums + self.upcast() + self.supports()

    def sums(self, rows: int) -> int:
        """Float32 sums [rows, D] of gradients that are returned in another dtype."""
        return 0 if self.dtype.itemsize >= 4 else rows * self.dim * 4

    def upcast(self) -> int:
        """Slices of a 16-bit weight in float32, of 16 threads; GPUs need none."""
        upcasts = self.device == "cpu" and self.dtype.itemsize < 4
        return min(16 * SLICE_ROWS, self.rows) * self.dim * 4 if upcasts else 0

    def recompute(self) -> int:
        """Chunks of the vocabulary [n, v], and the sums of dhidden and of a chunk's dweight."""
        machine = Machine.of(torch.device("cpu"), self.shape.operand_bytes)
        if self.device != "cpu":
            machine = GPUS[self.device].machine(self.shape.operand_bytes)
        _, (rows, columns) = recompute_chunks(self.shape, machine, self.budget, fused=False)
        sums = self.sums(self.tokens + columns) + self.upcast()
        return rows * columns * self.shape.bytes_a_logit + sums + self.supports()

    def supports(self) -> int:
        """Values, ids and their gradients of both models on S, and what a row keeps beside them."""
        return self.tokens * (2 * self.k * (4 + 8 + 4) + 2 * 6 * 4)

    def exchanged(self, full: bool = False) -> dict[str, int]:
        """What a rank sends, by what it is for; none without ranks."""
        others, share = self.ranks - 1, (self.ranks - 1) / self.ranks
        ring = int(2 * share * self.tokens * 4)  # an all-reduce of a float32 for each token
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
        """The rows of the student's weight that a rank holds."""
        return self.rows * self.dim * self.dtype.itemsize

    def exchanged_for_weights(self) -> dict[str, int]:
        """What a rank sends for the student's head where ranks have other tokens, by rings: FSDP2
        gathers it once in a forward pass, and reduces its gradient once in a step.
        """
        share = (self.ranks - 1) / self.ranks
        size = share * self.vocab * self.dim * self.dtype.itemsize
        return {"gather of the weight": int(size), "reduction of its gradient": int(size)}


def table(loss: Loss) -> str:
    """Markdown: peaks of eager code and of this package, and what ranks exchange."""
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
    """Markdown: what a rank holds and sends where a head is split over ranks, one loss a row; last
    what it sends for the weight under FSDP2, where each rank has so many tokens of its own.
    """
    names = ("head", "one_pass", "recompute", "sends", "of it top-K", "sends under FSDP2")
    lines = [f"| ranks | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for loss in losses:
        exchanged = loss.exchanged()
        small = sum(exchanged.values()) - exchanged["sum of dhidden"]
        sizes = [loss.head(), loss.one_pass(), loss.recompute(), sum(exchanged.values()), small]
        sizes.append(sum(loss.exchanged_for_weights().values()))
        figures = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
        lines.append(f"| {loss.ranks} | {figures} |")
    return "\n".join(lines)


def read_config(path: Path) -> tuple[int, int]:
    """D and V of a model's config.json, or of the directory that holds it."""
    if not isinstance(path, Path):
        raise TypeError(f"path: expected a pathlib.Path, got {got(path)}")
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path: expected a model's config.json or the directory that holds it, got {path} "
            f"({error})"
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
    parser.add_argument("--model-config", type=Path, help="a config.json, or its directory")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--tokens", type=int, default=8192, help="in a micro-batch")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", *GPUS], default="H100")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1], help="that a tensor-parallel head is on"
    )
    parser.add_argument("--chunk-bytes", type=int)
    given = parser.parse_args()
    dim, vocab = given.dim, given.vocab
    if given.model_config is not None:
        dim, vocab = read_config(given.model_config)
    if dim is None or vocab is None:
        parser.error("pass --model-config, or --dim and --vocab")
    dtype, sizes = getattr(torch, given.dtype), (given.tokens, dim, vocab, given.k)
    losses = [Loss(*sizes, dtype, given.device, n, given.chunk_bytes) for n in given.ranks]
    print(f"N = {given.tokens:,}, D = {dim:,}, V = {vocab:,}, K = {given.k}, {given.dtype}\n")
    print(table(losses[0]) if len(losses) == 1 else f"MiB:\n\n{ranks_table(losses)}")


if __name__ == "__main__":
    main()

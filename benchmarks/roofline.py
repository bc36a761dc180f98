"""A roofline model: the least time that each provider needs on a GPU, by its FLOPs and bytes.

Nothing here is measured. Our two orders are counted kernel by kernel, as in
opd_kernels/linear/cost_model.py. Peers are counted from their published algorithms; each PyTorch
kernel reads and writes its operands once. Peak rates come from the vendors' data sheets. No
implementation reaches them, so the ratios say more than the times.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.markdown import markdown_table
from benchmarks.measurement import MIB
from benchmarks.problems import HEADS, Problem
from opd_kernels.backends.triton.configs import MAX_FUSED_DIM
from opd_kernels.linear import cost_model, plan
from opd_kernels.linear.cost_model import (
    ONE_KERNEL_LAUNCHES,
    Kernel,
    Machine,
    Shape,
    recompute,
    seconds,
)

GPUS = {name: cost_model.GPUS[name].machine(2) for name in ("A100", "H100", "H200", "B200")}
SHAPES = HEADS | {"Qwen3-8B": (4_096, 151_936)}
BUDGET = 1536 * MIB
TOKENS = (512, 8_192)
K = 20


@dataclass(frozen=True)
class Estimate:
    """The least time of one provider at one shape."""

    gpu: str
    head: str
    tokens: int
    provider: str
    seconds: float
    ratio: float  # to the floor of its family
    chosen: bool = False  # whether method="auto" takes it


def _elementwise(shape: Shape, **bytes_per_entry: int) -> Iterator[Kernel]:
    """Yield a kernel over [N, V] for each number of bytes read and written per entry."""
    for name, size in bytes_per_entry.items():
        yield Kernel(name, bytes=float(shape.tokens * shape.vocab * size))


def _product(shape: Shape, entry_bytes: int = 2) -> Kernel:
    """Return a matrix product between [N, V], of entry_bytes each, and bf16 [N, D] and [V, D]."""
    moved = entry_bytes * shape.tokens * shape.vocab
    moved += 2 * shape.dim * (shape.tokens + shape.vocab)
    return Kernel("product", 2.0 * shape.tokens * shape.vocab * shape.dim, float(moved))


def floor(shape: Shape, models: int = 2) -> Iterator[Kernel]:
    """The matrix products alone, with logits in bf16: one per model forward and two backward."""
    for _ in range(models + 2):
        yield _product(shape)


def eager_full(shape: Shape) -> Iterator[Kernel]:
    """providers.eager_full, with one elementwise kernel per operation."""
    for _ in ("student", "teacher"):
        yield _product(shape)
        yield from _elementwise(shape, to_float=6, log_softmax=8)
    yield from _elementwise(shape, exp=8, difference=12, times=12, total=4)
    # Backward: both factors of the product, exp, their sum, log_softmax, and the cast to bf16.
    yield from _elementwise(shape, factor=8, other=8, exp=12, sum=12, log_softmax=12, to_half=6)
    yield _product(shape)
    yield _product(shape)


def liger_jsd(shape: Shape) -> Iterator[Kernel]:
    """Liger-Kernel's JSD at beta = 1 in bf16, compiled, in chunks of 1,024 tokens.

    The logits of both models are read for their sums, for the loss and for the gradient.
    """
    chunks = max(1, shape.tokens // 1024)
    chunk = replace(shape, tokens=shape.tokens // chunks)
    for _ in range(chunks):
        for _ in ("student", "teacher", "dhidden", "dweight"):
            yield _product(chunk)
        yield from _elementwise(chunk, sums=4, loss=4, gradient=6)
        yield Kernel("add dweight", bytes=6.0 * shape.vocab * shape.dim)


def cut_labels(shape: Shape) -> Iterator[Kernel]:
    """Cut cross-entropy without its gradient filter; logits are recomputed and never stored."""
    for _ in ("forward", "recompute", "dhidden", "dweight"):
        yield _product(shape, entry_bytes=0)


def estimates(gpu: str, head: str, tokens: int) -> list[Estimate]:
    """Return the estimates of every provider at one shape."""
    machine = GPUS[gpu]
    dim, vocab = SHAPES[head]
    shape = Shape(tokens, dim, vocab, K, operand_bytes=2, loss_launches=ONE_KERNEL_LAUNCHES)
    fused = dim <= MAX_FUSED_DIM
    ours = {
        name: seconds(kernels, machine)
        for name, kernels in plan.orders_of(shape, machine, BUDGET, fused, shape).items()
    }
    labels = replace(shape, k=1)
    families = [
        {
            "floor": seconds(floor(shape), machine),
            "ours_one_pass": ours["one_pass"],
            "ours_recompute": ours["recompute"],
            "eager_full": seconds(eager_full(shape), machine),
            "liger_jsd": seconds(liger_jsd(shape), machine),
        },
        {
            "floor, labels": seconds(floor(labels, models=1), machine),
            "ours_labels": seconds(_labels(labels, machine, fused), machine),
            "cut_labels": seconds(cut_labels(labels), machine),
        },
    ]
    chosen = "ours_" + plan.cheaper_order(shape, machine, BUDGET, fused)
    return [
        Estimate(gpu, head, tokens, name, time, time / next(iter(family.values())), name == chosen)
        for family in families
        for name, time in family.items()
    ]


def _labels(shape: Shape, machine: Machine, fused: bool) -> Iterator[Kernel]:
    """providers.ours_labels: one given id per row, with logits recomputed in the backward pass."""
    sizes = plan.recompute_chunks(shape, machine, BUDGET, fused)
    return recompute(shape, *sizes, machine, fused, selects=False)


def table(rows: list[Estimate]) -> str:
    """Return a table of milliseconds and ratios to the floor; method="auto" takes the bold one."""
    names = list(dict.fromkeys(row.provider for row in rows))
    groups: dict[tuple[str, str, int], dict[str, Estimate]] = {}
    for row in rows:
        groups.setdefault((row.gpu, row.head, row.tokens), {})[row.provider] = row
    lines = []
    for (gpu, head, tokens), group in groups.items():
        cells = []
        for name in names:
            estimate = group[name]
            cell = f"{1e3 * estimate.seconds:.2f} ({estimate.ratio:.2f})"
            cells.append(f"**{cell}**" if estimate.chosen else cell)
        lines.append([gpu, head, f"{tokens:,}", *cells])
    return markdown_table(("GPU", "head", "N", *names), lines)


def bf16_chunk(tokens: int = 256) -> str:
    """Describe the time that bf16 logits chunks would save on an H100, and their rounding error."""
    dim, vocab = SHAPES["Qwen3-8B"]
    shape = Shape(8_192, dim, vocab, K, operand_bytes=2, loss_launches=ONE_KERNEL_LAUNCHES)
    machine = GPUS["H100"]
    ours, in_bf16 = (
        min(seconds(k, machine) for k in plan.orders_of(s, machine, BUDGET, False, s).values())
        for s in (shape, replace(shape, logit_bytes=2))
    )
    inputs = Problem(tokens, 1_024, vocab).tensors()
    z, y = (inputs[f"{m}hidden"] @ inputs[f"{m}weight"].T for m in ("", "teacher_"))
    ids = z.topk(K).indices
    exact = _topk_gradient(z.double(), y.double(), ids)

    def errors(dtype: torch.dtype) -> list[float]:
        rounded = _topk_gradient(z.to(dtype), y.to(dtype), ids)
        pairs = zip(rounded, exact, strict=True)
        return [((r.double() - e).norm() / e.norm()).item() for r, e in pairs]

    (loss, dlogits), (loss_16, dlogits_16) = errors(torch.float32), errors(torch.bfloat16)
    return (
        f"Logits chunks in bf16 (H100, Qwen3-8B, N = 8,192): {1e3 * in_bf16:.1f} ms instead of "
        f"{1e3 * ours:.1f}. Relative error against float64 on {tokens} rows of logits as peaked as "
        f"SmolLM2's: loss {loss_16:.1e} instead of {loss:.1e}, gradient of logits "
        f"{dlogits_16:.1e} instead of {dlogits:.1e}."
    )


def _topk_gradient(z: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top-K reverse KL of each row at given ids, and its gradient."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    z, y = z.to(dtype).requires_grad_(), y.to(dtype)
    log_p, log_q = z.log_softmax(-1).gather(1, ids), y.log_softmax(-1).gather(1, ids)
    loss = (log_p.exp() * (log_p.detach() - log_q)).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def plot(rows: list[Estimate], path: Path) -> None:
    """Plot the ratio to the floor by head, with one panel per GPU and number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in dict.fromkeys(r.provider for r in rows) if "label" not in name][1:]
    figure, panels = pyplot.subplots(
        len(TOKENS), len(GPUS), figsize=(15, 7), sharey=True, squeeze=False, layout="constrained"
    )
    width = 0.8 / len(names)
    for line, tokens in zip(panels, TOKENS, strict=True):
        for panel, gpu in zip(line, GPUS, strict=True):
            for place, name in enumerate(names):
                ratios = [
                    r.ratio
                    for head in SHAPES
                    for r in rows
                    if (r.gpu, r.head, r.tokens, r.provider) == (gpu, head, tokens, name)
                ]
                at = [i + width * (place - (len(names) - 1) / 2) for i in range(len(SHAPES))]
                panel.bar(at, ratios, width, label=name)
            panel.axhline(1.0, color="black", linewidth=1)
            panel.set_xticks(range(len(SHAPES)), SHAPES, rotation=35, ha="right", fontsize=8)
            panel.set(title=f"{gpu}, N = {tokens:,}", yscale="log")
            panel.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
            panel.minorticks_off()
            panel.grid(True, axis="y", alpha=0.3)
        line[0].set_ylabel("time / four matrix products")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    figure.suptitle("A model by FLOPs and bytes, not a measurement: bf16, K = 20, two models")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "roofline", help="least time of the losses on GPUs, modelled by FLOPs and bytes"
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--heads", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--output", type=Path, default=Path("runs/roofline"))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table; write it, its numbers as JSON, and a plot of the default shapes."""
    cases = list(product(arguments.gpus, arguments.heads, arguments.tokens))
    rows = [row for case in tqdm(cases, desc="shapes") for row in estimates(*case)]
    report = (
        f"A model by FLOPs and bytes, not a measurement: ms (ratio to the floor).\n\n{table(rows)}"
    )
    report += f"\n\n{bf16_chunk()}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "roofline.md").write_text(report + "\n")
    (arguments.output / "roofline.json").write_text(json.dumps([asdict(r) for r in rows], indent=2))
    if len(cases) == len(GPUS) * len(SHAPES) * len(TOKENS):
        plot(rows, arguments.output / "roofline.png")
    print(report)

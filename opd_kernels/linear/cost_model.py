"""What a pass costs on a machine, by the operations and bytes of its kernels: a model, not a
measurement.

`method="auto"` compares the two orders by it, and `python -m benchmarks roofline` draws it. Every
kernel here stands for one that the driver launches, in the driver's order; its bytes are those of
the tensors it is launched with (tests/linear/test_cost_model.py). A kernel takes as long as its
operations or its bytes, whichever is slower; a chunk that fits in the cache moves no bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Small kernels on [n, K] of the state, the loss and its gradient: by autograd, and with one kernel
# of the backend's for the loss.
AUTOGRAD_LAUNCHES, ONE_KERNEL_LAUNCHES = 80, 25
# What a product inside a kernel of ours is assumed to reach of cuBLAS's speed: not measured yet.
FUSED_EFFICIENCY = 2 / 3
# D up to which kernels with the product inside are used. Writing a logit and reading it again costs
# as much as about 1,200 terms of its product on an H100: at that efficiency they draw at 2,400.
MAX_FUSED_DIM = 2048


@dataclass(frozen=True)
class Machine:
    """What a kernel's operations and bytes cost."""

    flops: float  # per second, of matrix products of the operands' dtype
    bandwidth: float  # bytes per second of memory
    cache: int  # bytes of a chunk that stays near between two kernels
    launch: float = 4e-6  # seconds that a kernel takes at least
    overlaps: bool = True  # a kernel multiplies while it moves its bytes

    @classmethod
    def of(cls, device: torch.device, operand_bytes: int) -> "Machine":
        """The machine behind a device; a GPU that is not in the table counts as the nearest one."""
        if device.type != "cuda":
            return _CPU
        own = torch.cuda.get_device_capability(device)
        return gpu_of(own, torch.cuda.get_device_name(device)).machine(operand_bytes)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, from its maker's data sheet."""

    capability: tuple[int, int]
    tensor_flops: float  # dense, of 16-bit operands with float32 sums
    float_flops: float  # of float32 operands
    bandwidth: float
    l2_bytes: int

    def machine(self, operand_bytes: int) -> Machine:
        """With products of 16-bit or of float32 operands; a chunk leaves other data a quarter of
        the L2 cache.
        """
        flops = self.tensor_flops if operand_bytes == 2 else self.float_flops
        return Machine(flops, self.bandwidth, self.l2_bytes * 3 // 4)


_MIB = 1 << 20
GPUS = {
    "T4": Gpu((7, 5), 65e12, 8.1e12, 0.32e12, 4 * _MIB),
    "A100": Gpu((8, 0), 312e12, 19.5e12, 2.039e12, 40 * _MIB),
    "RTX 3090": Gpu((8, 6), 71e12, 35.6e12, 0.936e12, 6 * _MIB),
    "RTX 4090": Gpu((8, 9), 165e12, 82.6e12, 1.008e12, 72 * _MIB),
    "H100": Gpu((9, 0), 989.4e12, 66.9e12, 3.35e12, 50 * _MIB),
    "H200": Gpu((9, 0), 989.4e12, 66.9e12, 4.8e12, 50 * _MIB),
    "B200": Gpu((10, 0), 2250e12, 75e12, 7.7e12, 126 * _MIB),
    "RTX 5090": Gpu((12, 0), 209.5e12, 104.8e12, 1.792e12, 96 * _MIB),
}


def gpu_of(capability: tuple[int, int], name: str) -> Gpu:
    """The table's entry of that name, else the first of the nearest capability not above."""
    for known, gpu in GPUS.items():
        if known in name:
            return gpu
    below = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    return max(below, key=lambda gpu: gpu.capability, default=GPUS["T4"])


# Two cores with AVX2 (python -m benchmarks chunks); only the ratio of the first two decides. Bytes
# and operations do not overlap there: one thread does both.
_CPU = Machine(flops=150e9, bandwidth=12e9, cache=24 * _MIB, launch=1e-5, overlaps=False)


@dataclass(frozen=True)
class Kernel:
    """One launch, or several small ones, of a known kind."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    efficiency: float = 1.0  # of the machine's FLOPs that it reaches

    def seconds(self, machine: Machine) -> float:
        """How long it takes at least."""
        times = (self.flops / (machine.flops * self.efficiency), self.bytes / machine.bandwidth)
        return self.launches * machine.launch + (max(times) if machine.overlaps else sum(times))


def seconds(kernels: Iterator[Kernel], machine: Machine) -> float:
    """How long kernels take one after the other."""
    return sum(kernel.seconds(machine) for kernel in kernels)


@dataclass(frozen=True)
class Shape:
    """A head and its tokens as the products see them."""

    tokens: int
    dim: int
    vocab: int
    k: int
    operand_bytes: int  # an element's, of hidden states, weight and gradient chunk in a product
    logit_bytes: int = 4
    sum_bytes: int = 4  # of an accumulated gradient, and of all that is kept of a row
    dhidden: bool = True  # which gradients are needed
    dweight: bool = True
    loss_launches: int = AUTOGRAD_LAUNCHES

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.dhidden or self.dweight

    @property
    def bytes_a_logit(self) -> int:
        """Of a chunk in the one-pass order: the logit, and its gradient where that is apart."""
        if self.operand_bytes == self.logit_bytes:
            return self.logit_bytes
        return self.logit_bytes + self.operand_bytes


@dataclass(frozen=True)
class _Chunk:
    """The kernels on a chunk of n tokens and v columns."""

    shape: Shape
    n: int
    v: int
    cache: int

    def _chunk_bytes(self, itemsize: int) -> int:
        """Of memory, not of cache."""
        size = self.n * self.v * itemsize
        return 0 if size <= self.cache else size

    def _product(self, name: str, n_d: int, v_d: int, n_v: int) -> Kernel:
        """A matrix product of n * v * D terms; the others are bytes an element of each operand."""
        dim = self.shape.dim
        moved = self.n * dim * n_d + self.v * dim * v_d + self._chunk_bytes(n_v)
        return Kernel(name, 2.0 * self.n * self.v * dim, moved)

    def logits(self) -> Kernel:
        return self._product(
            "logits", self.shape.operand_bytes, self.shape.operand_bytes, self.shape.logit_bytes
        )

    def update(self, selects: bool) -> Kernel:
        # Running values and ids are read and written, given ids are read, the two sums both.
        slot = 2 * (self.shape.sum_bytes + 8) if selects else self.shape.sum_bytes + 8
        rows = self.n * (self.shape.k * slot + 4 * self.shape.sum_bytes)
        return Kernel("update", bytes=self._chunk_bytes(self.shape.logit_bytes) + rows)

    def _gradient_rows(self) -> int:
        return self.n * (self.shape.k * (self.shape.sum_bytes + 8) + 2 * self.shape.sum_bytes)

    def gradient(self) -> Kernel:
        chunk = self._chunk_bytes(self.shape.logit_bytes) + self._chunk_bytes(
            self.shape.operand_bytes
        )
        return Kernel("gradient", bytes=chunk + self._gradient_rows())

    def fused_update(self) -> Kernel:
        product = self._product(
            "fused update", self.shape.operand_bytes, self.shape.operand_bytes, 0
        )
        rows = self.n * self.shape.k * (self.shape.sum_bytes + 8)
        moved = product.bytes + rows
        return Kernel(product.name, product.flops, moved, efficiency=FUSED_EFFICIENCY)

    def fused_gradient(self) -> Kernel:
        operand = self.shape.operand_bytes
        product = self._product("fused gradient", operand, operand, operand)
        moved = product.bytes + self._gradient_rows()
        return Kernel(product.name, product.flops, moved, efficiency=FUSED_EFFICIENCY)

    def dhidden(self) -> Kernel:
        return self._product(
            "dhidden", 2 * self.shape.sum_bytes, self.shape.operand_bytes, self.shape.operand_bytes
        )

    def dweight(self, first: bool, alone: bool = False) -> Kernel:
        element = self.shape.operand_bytes if alone else self.shape.sum_bytes
        written = element * (1 if first else 2)
        return self._product("dweight", self.shape.operand_bytes, written, self.shape.operand_bytes)


def reduction(
    shape: Shape, rows: int, columns: int, machine: Machine, selects: bool, fused: bool
) -> Iterator[Kernel]:
    """driver.reduce_logits in chunks of rows and columns."""
    if fused and not selects:
        yield _Chunk(shape, shape.tokens, shape.vocab, machine.cache).fused_update()
        return
    for v in pieces(shape.vocab, columns):
        for n in pieces(shape.tokens, rows):
            chunk = _Chunk(shape, n, v, machine.cache)
            yield chunk.logits()
            yield chunk.update(selects)


def backpropagation(
    shape: Shape, rows: int, columns: int, machine: Machine, fused: bool
) -> Iterator[Kernel]:
    """driver.backpropagate in chunks of rows and columns."""
    for v in pieces(shape.vocab, columns):
        for block, n in enumerate(pieces(shape.tokens, rows)):
            chunk = _Chunk(shape, n, v, machine.cache)
            if fused:
                yield chunk.fused_gradient()
            else:
                yield chunk.logits()
                yield chunk.gradient()
            if shape.dhidden:
                yield chunk.dhidden()
            if shape.dweight:
                yield chunk.dweight(block == 0)
        if shape.dweight and shape.operand_bytes != shape.sum_bytes:
            yield Kernel("round", bytes=v * shape.dim * (shape.sum_bytes + shape.operand_bytes))


def recompute(
    shape: Shape,
    forward: tuple[int, int],
    backward: tuple[int, int],
    machine: Machine,
    fused: bool,
    selects: bool = True,
) -> Iterator[Kernel]:
    """A student's pass in the recompute order; chunks are given as rows and columns."""
    yield from reduction(shape, *forward, machine, selects, fused)
    yield Kernel("objective", launches=shape.loss_launches)
    if shape.trains:
        yield from backpropagation(shape, *backward, machine, fused)


def one_pass(shape: Shape, rows: int, machine: Machine, selects: bool = True) -> Iterator[Kernel]:
    """A student's pass in the one-pass order, in chunks of rows."""
    sums = shape.vocab * shape.dim
    alone = shape.tokens <= rows  # dweight is rounded at once
    for block, n in enumerate(pieces(shape.tokens, rows)):
        chunk = _Chunk(shape, n, shape.vocab, machine.cache)
        yield chunk.logits()
        yield chunk.update(selects)
        yield Kernel("objective", launches=shape.loss_launches)
        if shape.trains:
            yield chunk.gradient()
        if shape.dhidden:
            yield chunk.dhidden()
        if shape.dweight:
            yield chunk.dweight(block == 0, alone)
    if shape.dweight:
        element = shape.operand_bytes if alone else shape.sum_bytes
        yield Kernel("round", bytes=sums * (element + shape.operand_bytes))


def pieces(total: int, most: int) -> list[int]:
    """Sizes of the pieces of total."""
    return [min(most, total - first) for first in range(0, total, most)]

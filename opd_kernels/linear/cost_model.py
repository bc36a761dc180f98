"""A roofline model of a loss's time on a machine, from the FLOPs and bytes of its kernels.

`method="auto"` compares the two orders with it, and `python -m benchmarks roofline` plots it. It
lists the kernels of a pass in the order in which they are launched. The bytes of a kernel are those
of the tensors that it reads and writes, which tests/linear/test_cost_model.py compares with real
launches. A kernel takes the time of its FLOPs or of its bytes, whichever is longer. A chunk of
logits that fits in the cache moves no bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Small kernels on [n, K] tensors per chunk, for the running state, the loss and its gradient: when
# autograd differentiates the loss, and when one kernel of the backend computes it.
AUTOGRAD_LAUNCHES, ONE_KERNEL_LAUNCHES = 80, 25
# Assumed speed of a matrix product inside our kernels, as a fraction of cuBLAS's; not measured yet.
FUSED_EFFICIENCY = 2 / 3


@dataclass(frozen=True)
class Machine:
    """The rates at which a device computes and moves bytes."""

    flops: float  # FLOP/s of matrix products in the operands' dtype
    bandwidth: float  # bytes/s of main memory
    cache: int  # largest chunk, in bytes, that stays in the cache between two kernels
    launch: float = 4e-6  # seconds that every kernel takes at least
    overlaps: bool = True  # whether a kernel computes while it moves its bytes

    @classmethod
    def for_device(cls, device: torch.device, operand_bytes: int) -> "Machine":
        """Return the model of a device. A GPU that is not in GPUS takes the nearest one's rates."""
        if device.type != "cuda":
            return _CPU
        capability = torch.cuda.get_device_capability(device)
        return find_gpu(capability, torch.cuda.get_device_name(device)).machine(operand_bytes)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, from the vendor's data sheet."""

    capability: tuple[int, int]
    tensor_flops: float  # dense FLOP/s of 16-bit operands with float32 accumulation
    float_flops: float  # FLOP/s of float32 operands
    bandwidth: float  # bytes/s
    l2_bytes: int

    def machine(self, operand_bytes: int) -> Machine:
        """Return the model for 16-bit (operand_bytes 2) or float32 operands. A chunk may fill three
        quarters of the L2 cache; other data needs the rest.
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


def find_gpu(capability: tuple[int, int], name: str) -> Gpu:
    """Return the entry of GPUS whose name occurs in `name`. If there is none, return the first
    entry with the highest capability that does not exceed this one.
    """
    for known, gpu in GPUS.items():
        if known in name:
            return gpu
    below = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    return max(below, key=lambda gpu: gpu.capability, default=GPUS["T4"])


# Measured on two cores with AVX2 (python -m benchmarks chunks). Only the ratio of FLOP/s to bytes/s
# matters for the choice of an order. A CPU thread does not compute while it waits for bytes.
_CPU = Machine(flops=150e9, bandwidth=12e9, cache=24 * _MIB, launch=1e-5, overlaps=False)


@dataclass(frozen=True)
class Kernel:
    """One kernel launch, or several launches of small kernels."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    efficiency: float = 1.0  # fraction of the machine's FLOP/s that the kernel reaches

    def seconds(self, machine: Machine) -> float:
        """Lower bound of the kernel's time."""
        times = (self.flops / (machine.flops * self.efficiency), self.bytes / machine.bandwidth)
        return self.launches * machine.launch + (max(times) if machine.overlaps else sum(times))


def seconds(kernels: Iterator[Kernel], machine: Machine) -> float:
    """Total time of kernels that run one after the other."""
    return sum(kernel.seconds(machine) for kernel in kernels)


@dataclass(frozen=True)
class Shape:
    """Sizes of a head and its tokens, and bytes per element of the tensors involved."""

    tokens: int
    dim: int
    vocab: int
    k: int
    operand_bytes: int  # hidden states, weight and gradient chunk, as operands of a product
    logit_bytes: int = 4
    sum_bytes: int = 4  # accumulated gradients, and the values and sums kept per row
    dhidden: bool = True  # whether the gradient of hidden is needed
    dweight: bool = True  # whether the gradient of the weight is needed
    loss_launches: int = AUTOGRAD_LAUNCHES

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.dhidden or self.dweight

    @property
    def bytes_per_logit(self) -> int:
        """Bytes per logit of a chunk in the one-pass order. The gradient overwrites a logit of the
        same dtype and needs its own memory otherwise.
        """
        if self.operand_bytes == self.logit_bytes:
            return self.logit_bytes
        return self.logit_bytes + self.operand_bytes


@dataclass(frozen=True)
class _Chunk:
    """The kernels that process a chunk of n tokens and v columns."""

    shape: Shape
    n: int
    v: int
    cache: int

    def _chunk_bytes(self, itemsize: int) -> int:
        """Bytes of the chunk that go to main memory; 0 if the cache holds it."""
        size = self.n * self.v * itemsize
        return 0 if size <= self.cache else size

    def _product(self, name: str, n_d: int, v_d: int, n_v: int) -> Kernel:
        """A matrix product with n * v * D multiply-adds. n_d, v_d and n_v are the bytes moved per
        element of the tensors [n, D], [v, D] and [n, v].
        """
        dim = self.shape.dim
        moved = self.n * dim * n_d + self.v * dim * v_d + self._chunk_bytes(n_v)
        return Kernel(name, 2.0 * self.n * self.v * dim, moved)

    def logits(self) -> Kernel:
        return self._product(
            "logits", self.shape.operand_bytes, self.shape.operand_bytes, self.shape.logit_bytes
        )

    def update(self, selects: bool) -> Kernel:
        # A selection reads and writes the running values and ids. Given ids are read, and their
        # values written. Both cases read and write the row's maximum and sum.
        slot = 2 * (self.shape.sum_bytes + 8) if selects else self.shape.sum_bytes + 8
        rows = self.n * (self.shape.k * slot + 4 * self.shape.sum_bytes)
        return Kernel("update", bytes=self._chunk_bytes(self.shape.logit_bytes) + rows)

    def _gradient_rows(self) -> int:
        """Bytes of ids, dvalues, tail and dtail that the gradient reads."""
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
        """The first block of tokens writes dweight, later blocks also read it. `alone`: there is
        one block only, which writes in the operands' dtype instead of adding to a float32 sum.
        """
        element = self.shape.operand_bytes if alone else self.shape.sum_bytes
        written = element * (1 if first else 2)
        return self._product("dweight", self.shape.operand_bytes, written, self.shape.operand_bytes)


def reduction(
    shape: Shape, rows: int, columns: int, machine: Machine, selects: bool, fused: bool
) -> Iterator[Kernel]:
    """Kernels of vocabulary_walk.reduce_logits with chunks of rows and columns."""
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
    """Kernels of vocabulary_walk.backpropagate with chunks of rows and columns."""
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
    """Kernels of a student's pass in the recompute order. `forward` and `backward` are the rows and
    columns of a chunk.
    """
    yield from reduction(shape, *forward, machine, selects, fused)
    yield Kernel("objective", launches=shape.loss_launches)
    if shape.trains:
        yield from backpropagation(shape, *backward, machine, fused)


def one_pass(shape: Shape, rows: int, machine: Machine, selects: bool = True) -> Iterator[Kernel]:
    """Kernels of a student's pass in the one-pass order, with chunks of `rows` tokens."""
    weight_elements = shape.vocab * shape.dim
    alone = shape.tokens <= rows  # a single chunk writes dweight in the operands' dtype
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
        yield Kernel("round", bytes=weight_elements * (element + shape.operand_bytes))


def pieces(total: int, size: int) -> list[int]:
    """Lengths of the pieces when `total` is cut into pieces of `size`; the last may be shorter."""
    return [min(size, total - first) for first in range(0, total, size)]

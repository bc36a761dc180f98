"""Fixed launch configurations: no tuning at run time, so that two runs are bitwise equal."""

from dataclasses import dataclass

import torch
import triton

# Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Above these a row's support no longer fits in registers beside a block of its logits; PyTorch
# does that work instead. Selection holds and compares more than the others do.
MAX_SELECTED = 128
MAX_GIVEN = 1024
_LARGE_K = 256


# a * b + c is rounded once. Said at every launch, since Triton's default for it changes.
_CONTRACTS = True


@dataclass(frozen=True)
class RowConfig:
    """How a row kernel walks a row."""

    block: int  # columns at a time
    warps: int

    def fitted(self, columns: int, dtype: torch.dtype) -> "RowConfig":
        """For rows of so many columns: float64 takes twice the registers."""
        if INTERPRETED:  # several blocks, the last one uneven, even in a test's small vocabulary
            return RowConfig(triton.next_power_of_2(max(16, columns // 3)), self.warps)
        block = self.block // 2 if dtype == torch.float64 else self.block
        return RowConfig(min(block, max(128, triton.next_power_of_2(columns))), self.warps)

    def options(self) -> dict[str, int | bool]:
        """What a launch is told beside the kernel's arguments."""
        return {"num_warps": self.warps, "enable_fp_fusion": _CONTRACTS}


UPDATE = RowConfig(block=4096, warps=4)
UPDATE_LARGE_K = RowConfig(block=2048, warps=4)  # its slots take registers too


def update(k: int) -> RowConfig:
    """For a support of K slots."""
    return UPDATE if k <= _LARGE_K else UPDATE_LARGE_K


GRADIENT = RowConfig(block=2048, warps=4)
DIVERGENCE = RowConfig(block=2048, warps=4)
LOSS = RowConfig(block=1024, warps=4)  # slots of several rows


@dataclass(frozen=True)
class TileConfig:
    """How a kernel with a matrix product inside tiles [N, V]."""

    rows: int
    columns: int
    depth: int  # of D at a time
    warps: int
    stages: int

    def fitted(self) -> "TileConfig":
        """Tiles of which even a test's small problem has several."""
        return TileConfig(16, 16, 16, self.warps, self.stages) if INTERPRETED else self

    def options(self) -> dict[str, int | bool]:
        """What a launch is told: its tile, and how it is compiled."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "UPCAST": INTERPRETED,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": _CONTRACTS,
        }  # fmt: skip


# By compute capability; a GPU between two of them takes the lower one's.
_TILES = {
    80: TileConfig(rows=128, columns=128, depth=64, warps=8, stages=3),
    86: TileConfig(rows=128, columns=128, depth=64, warps=8, stages=2),
    90: TileConfig(rows=128, columns=128, depth=64, warps=8, stages=4),
    100: TileConfig(rows=128, columns=128, depth=64, warps=8, stages=4),
    120: TileConfig(rows=128, columns=128, depth=64, warps=8, stages=2),
}


def capability(device: torch.device) -> int:
    """The device's compute capability as one number, 90 for 9.0; without a GPU the lowest one."""
    if device.type != "cuda":
        return min(_TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles(device: torch.device) -> TileConfig:
    """The tiles for a device."""
    own = capability(device)
    return _TILES[max((c for c in _TILES if c <= own), default=min(_TILES))].fitted()


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


# Blocks of one program of the gradient kernel: enough to pay for reading S.
GRADIENT_BLOCKS = 8

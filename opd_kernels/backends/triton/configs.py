"""Launch configurations from a table: no tuning at run time, so that two runs are bitwise equal.

`python -m benchmarks tune` measures candidates on a GPU and writes its entries to configs.json. An
entry holds for one kernel at most so many slots of S (`k`) and terms of a product (`dim`), for
logits with or without a softcap or bias (`plain`); what an entry leaves out it holds for any value
of. The first entry that fits is taken.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from opd_kernels.backends.devices import capability

# Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
TABLE = Path(__file__).with_name("configs.json")

# Above these a row's support no longer fits in registers beside a block of its logits; PyTorch
# does that work instead. Selection holds and compares more than the others do.
MAX_SELECTED = 128
MAX_GIVEN = 1024
# Kernels with the product inside look for each slot in a whole tile of logits.
MAX_FUSED = 64

# Blocks of one program of the gradient kernel: enough to pay for reading S.
GRADIENT_BLOCKS = 8
# a * b + c is rounded once. Said at every launch, since Triton's default for it changes.
_CONTRACTS = True


@dataclass(frozen=True)
class Case:
    """What a configuration may depend on."""

    kernel: str
    k: int
    plain: bool  # neither softcap nor bias
    dim: int = 0  # D, of kernels with a product inside


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
        return replace(self, rows=16, columns=16, depth=16) if INTERPRETED else self

    def options(self) -> dict[str, int | bool]:
        """What a launch is told: its tile, and how it is compiled."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "UPCAST": INTERPRETED,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": _CONTRACTS,
        }  # fmt: skip


Config = RowConfig | TileConfig


def row_config(case: Case, device: torch.device) -> RowConfig:
    """The configuration of a row kernel on a device."""
    config = find(case, capability(device))
    assert isinstance(config, RowConfig)
    return config


def tile_config(case: Case, device: torch.device) -> TileConfig:
    """The configuration of a kernel with a product inside on a device, fitted."""
    config = find(case, capability(device))
    assert isinstance(config, TileConfig)
    return config.fitted()


@cache
def find(case: Case, own_capability: int) -> Config:
    """The table's configuration; a GPU between two capabilities takes the lower one's."""
    table = _table()
    nearest = max((c for c in table if c <= own_capability), default=min(table))
    for entry in (*table[nearest], *table[0]):
        if _fits(entry, case):
            config = entry["config"]
            return TileConfig(**config) if "depth" in config else RowConfig(**config)
    raise KeyError(f"{TABLE}: no configuration of {case}")


def entry_of(case: Case, config: Config) -> dict[str, Any]:
    """A table's entry that holds for a case and for smaller K and D."""
    limits = {name: value for name, value in asdict(case).items() if value}
    return {**limits, "plain": case.plain, "config": asdict(config)}


def _fits(entry: dict[str, Any], case: Case) -> bool:
    return (
        entry["kernel"] == case.kernel
        and case.k <= entry.get("k", case.k)
        and case.dim <= entry.get("dim", case.dim)
        and entry.get("plain", case.plain) == case.plain
    )


@cache
def _table() -> dict[int, list[dict[str, Any]]]:
    """Entries by compute capability; those of 0 are for all."""
    return {int(name): entries for name, entries in json.loads(TABLE.read_text()).items()}


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Launch configurations from a table. Nothing is tuned at run time, so two runs are bitwise equal.

`python -m benchmarks tune` measures candidates on a GPU and writes the best to configs.json. An
entry matches one kernel (`kernel`), a support of at most `k` slots, a hidden size of at most `dim`,
and logits without (`plain` true) or with a softcap or bias. Omitted fields match anything. The
first entry that matches is used.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from opd_kernels.backends.devices import capability

# Whether kernels run in Triton's interpreter on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
TABLE = Path(__file__).with_name("configs.json")

# The largest K of each kind of kernel. Above it a row's support does not fit in registers beside a
# block of its logits, and the PyTorch implementation runs instead. Selecting the top K holds and
# compares more per slot than given ids do.
MAX_SELECTED = 128
MAX_GIVEN = 1024
# Kernels with the matrix product inside search a whole tile of logits for each slot.
MAX_FUSED = 64
# The largest D for kernels with the matrix product inside. Storing and loading a logit costs as
# much as about 1,200 multiply-adds of its product on an H100. At the assumed FUSED_EFFICIENCY of
# linear/cost_model.py both ways are equally fast at D = 2,400.
MAX_FUSED_DIM = 2048

# Blocks per program of the gradient kernel, so that reading S once is cheap in comparison.
GRADIENT_BLOCKS = 8
# Fuse a * b + c into one rounding. Set at every launch, because Triton's default changes.
_FUSE_MULTIPLY_ADD = True


@dataclass(frozen=True)
class Case:
    """A kernel and the properties of its problem that select a configuration."""

    kernel: str
    k: int
    plain: bool  # neither softcap nor bias
    dim: int = 0  # D of kernels with a matrix product inside, else 0


@dataclass(frozen=True)
class RowConfig:
    """Launch configuration of a kernel that handles a row block by block."""

    block: int  # columns per block
    warps: int

    def fitted(self, columns: int, dtype: torch.dtype) -> "RowConfig":
        """Return the configuration for rows of `columns` elements. float64 halves the block, since
        it takes twice the registers.
        """
        if INTERPRETED:  # tests have small vocabularies: use several blocks, the last one partial
            return RowConfig(triton.next_power_of_2(max(16, columns // 3)), self.warps)
        block = self.block // 2 if dtype == torch.float64 else self.block
        return RowConfig(min(block, max(128, triton.next_power_of_2(columns))), self.warps)

    def options(self) -> dict[str, int | bool]:
        """Compiler options of a launch."""
        return {"num_warps": self.warps, "enable_fp_fusion": _FUSE_MULTIPLY_ADD}


@dataclass(frozen=True)
class TileConfig:
    """Launch configuration of a kernel with a matrix product inside, which tiles [N, V]."""

    rows: int
    columns: int
    depth: int  # elements of D per step of the product
    warps: int
    stages: int

    def fitted(self) -> "TileConfig":
        """Return the configuration; in the interpreter with small tiles, so that even the small
        problems of tests have several.
        """
        return replace(self, rows=16, columns=16, depth=16) if INTERPRETED else self

    def options(self) -> dict[str, int | bool]:
        """Tile sizes and compiler options of a launch."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "UPCAST": INTERPRETED,
            "num_warps": self.warps, "num_stages": self.stages,
            "enable_fp_fusion": _FUSE_MULTIPLY_ADD,
        }  # fmt: skip


Config = RowConfig | TileConfig


def row_config(case: Case, device: torch.device) -> RowConfig:
    """Return the configuration of a row kernel on a device."""
    config = find(case, capability(device))
    assert isinstance(config, RowConfig)
    return config


def tile_config(case: Case, device: torch.device) -> TileConfig:
    """Return the fitted configuration of a kernel with a matrix product inside on a device."""
    config = find(case, capability(device))
    assert isinstance(config, TileConfig)
    return config.fitted()


@cache
def find(case: Case, device_capability: int) -> Config:
    """Return the table's configuration for a case. A GPU whose capability is not in the table takes
    the entries of the next lower one.
    """
    table = _table()
    nearest = max((c for c in table if c <= device_capability), default=min(table))
    for entry in (*table[nearest], *table[0]):
        if _matches(entry, case):
            config = entry["config"]
            return TileConfig(**config) if "depth" in config else RowConfig(**config)
    raise KeyError(f"{TABLE}: no configuration of {case}")


def entry_of(case: Case, config: Config) -> dict[str, Any]:
    """Return a table entry that matches a case and every smaller K and D."""
    limits = {name: value for name, value in asdict(case).items() if value}
    return {**limits, "plain": case.plain, "config": asdict(config)}


def _matches(entry: dict[str, Any], case: Case) -> bool:
    return (
        entry["kernel"] == case.kernel
        and case.k <= entry.get("k", case.k)
        and case.dim <= entry.get("dim", case.dim)
        and entry.get("plain", case.plain) == case.plain
    )


@cache
def _table() -> dict[int, list[dict[str, Any]]]:
    """Entries of configs.json by compute capability; those under 0 are for every GPU."""
    return {int(name): entries for name, entries in json.loads(TABLE.read_text()).items()}


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of programs that run at the same time, at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count

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


UPDATE = RowConfig(block=4096, warps=4)
GRADIENT = RowConfig(block=2048, warps=4)
DIVERGENCE = RowConfig(block=2048, warps=4)

# Blocks of one program of the gradient kernel: enough to pay for reading S.
GRADIENT_BLOCKS = 8

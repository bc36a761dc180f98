"""Where a kernel is launched, and what that device can do."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager:
    """A launch goes to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def capability(device: torch.device) -> int:
    """The device's compute capability as one number, 90 for 9.0; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

"""The device that a kernel is launched on, and its compute capability."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one: a launch goes to the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def capability(device: torch.device) -> int:
    """The device's compute capability as one number, 90 for 9.0; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

"""What a single value must be, for every door of the package alike: a message names the argument,
what was expected and what came. Only what the host knows is looked at, never a tensor's numbers.
"""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def got(value: Any) -> str:
    """What came: a tensor by its dtype, anything else by its type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def are_integer(ids: Tensor) -> bool:
    """Whether the dtype is one for token ids; bool is not."""
    dtype = ids.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_floating(name: str, tensor: Any, remedy: str = "cast it first") -> None:
    """Raise unless it is a tensor of logits, or of what makes them."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a tensor of float16, bfloat16, float32 or float64, got "
            f"{got(tensor)}; {remedy}"
        )


def check_token_ids(name: str, ids: Any) -> None:
    """Raise unless it is a tensor of token ids."""
    if not isinstance(ids, Tensor) or not are_integer(ids):
        raise TypeError(f"{name}: expected an integer tensor, got {got(ids)}; token ids are int64")


def check_device(name: str, tensor: Tensor, like: str, device: torch.device) -> None:
    """Raise unless a tensor is on the device of another."""
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected device {device}, as {like}'s, got {tensor.device}; move one of them"
        )


def check_flags(**flags: Any) -> None:
    """Raise unless all are bools: any other string would be true."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {got(flag)}; pass bool(...)")


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """Raise unless it is an int, and at least that."""
    # int stands beside its own base class since that is slow to ask.
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an int, got {got(value)}; pass int(...)")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def check_real(name: str, value: Any) -> None:
    """Raise unless it is a number of the host's."""
    is_number = isinstance(value, (float, Real)) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(
            f"{name}: expected a number, got {type(value).__name__}; a tensor would get no "
            "gradient, pass float(...)"
        )


def check_number(name: str, value: Any) -> None:
    """Raise unless it is a finite number."""
    check_real(name, value)
    if not abs(value) < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_temperature(temperature: Any) -> None:
    """Raise unless it is a divisor of logits."""
    check_real("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a positive number, got {temperature}; greedy sampling has no "
            "distribution to distil"
        )


def check_beta(name: str, beta: Any) -> None:
    """Raise unless it is a weight of the teacher in a mixture."""
    check_number(name, beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}: expected 0 (forward KL) to 1 (reverse KL), got {beta}")


def check_execution(chunk_bytes: Any, backend: Any) -> None:
    """Raise for what is no bound of memory, or no name; select_backend knows the names."""
    if chunk_bytes is not None and (
        isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1
    ):
        raise ValueError(
            f"chunk_bytes: expected a positive number of bytes or None, got {chunk_bytes!r}; it "
            "bounds the memory for logits that live at a time"
        )
    if not isinstance(backend, str):
        raise TypeError(
            f"backend: expected 'auto' or a name of available_backends(), got {got(backend)}"
        )

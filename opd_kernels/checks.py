"""Checks of arguments, for every public function alike.

A message names the argument, what was expected, what came and the remedy. The checks look at what
the host knows, such as dtypes and shapes, and not at a tensor's numbers; check_hidden_is_finite is
the one exception.
"""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd import forward_ad
from torch.nn import Parameter

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REVERSE_MODE_ONLY = (
    "opd_kernels: topk, gather, log_prob and distillation_loss have no derivative in forward mode "
    "or under torch.func; use backward() or torch.autograd.grad, or differentiate the logits of "
    "LazyLogits.materialize()"
)

_DEQUANTISE = (
    "cast or dequantise it first; for a model, exclude lm_head from quantisation, or call "
    "model.dequantize()"
)


def got(value: Any) -> str:
    """Describe a value for an error message: the dtype of a tensor, otherwise the type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def are_integer(ids: Tensor) -> bool:
    """Whether token ids can have this dtype; bool is excluded."""
    dtype = ids.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_floating(name: str, tensor: Any, remedy: str = "cast it first") -> None:
    """Raise TypeError unless it is a tensor of a floating dtype."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a tensor of float16, bfloat16, float32 or float64, got "
            f"{got(tensor)}; {remedy}"
        )


def check_token_ids(name: str, ids: Any) -> None:
    """Raise TypeError unless it is an integer tensor."""
    if not isinstance(ids, Tensor) or not are_integer(ids):
        raise TypeError(f"{name}: expected an integer tensor, got {got(ids)}; token ids are int64")


def check_device(name: str, tensor: Tensor, like: str, device: torch.device) -> None:
    """Raise ValueError unless a tensor is on the device of the argument `like`."""
    if tensor.device != device:
        remedy = "move one of them"
        if "meta" in (tensor.device.type, device.type):
            remedy = (
                "a tensor on the meta device has no data, so load it first, and keep lm_head out "
                "of accelerate's offloading"
            )
        raise ValueError(
            f"{name}: expected device {device}, as {like}'s, got {tensor.device}; {remedy}"
        )


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless all are bools: a string such as "no" would count as true."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {got(flag)}; pass bool(...)")


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """Raise unless it is an int, and at least `least`."""
    # int is listed too, since isinstance of the abstract class Integral alone is slow.
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an int, got {got(value)}; pass int(...)")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def check_real(name: str, value: Any) -> None:
    """Raise TypeError unless it is a Python number."""
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
    """Raise unless it is a finite positive number."""
    check_real("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a positive number, got {temperature}; greedy sampling has no "
            "distribution to distil"
        )


def check_beta(name: str, beta: Any) -> None:
    """Raise unless it is a number from 0 to 1, the teacher's weight in a mixture."""
    check_number(name, beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}: expected 0 (forward KL) to 1 (reverse KL), got {beta}")


def check_execution(chunk_bytes: Any, backend: Any) -> None:
    """Raise unless chunk_bytes is a positive int or None, and backend a str.

    select_backend checks that the backend exists.
    """
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


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are [..., D], [V, D] and [V] of floating dtypes on one device."""
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, operand in operands.items():
        check_floating(name, operand, _DEQUANTISE)
        _check_is_not_quantised(name, operand)
        check_device(name, operand, "hidden", hidden.device)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden, weight: expected [..., D] and [V, D] with the same D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; pass lm_head.weight as it is, not "
            "transposed"
        )
    if weight.shape[1] == 0:
        raise ValueError("hidden, weight: expected D >= 1, got D = 0; pass the head's own operands")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}; pass "
            "the rows that weight has"
        )


def _check_is_not_quantised(name: str, operand: Tensor) -> None:
    """Raise TypeError if a tensor has a floating dtype, but data of another one, as torchao's do.
    Such classes have a method dequantize of their own.
    """
    kind = type(operand)
    if kind not in (Tensor, Parameter) and kind.dequantize is not Tensor.dequantize:
        raise TypeError(
            f"{name}: expected a plain tensor, got {kind.__name__}, which is quantised; "
            f"{_DEQUANTISE}"
        )


def check_scalars(softcap: float | None, scale: float, temperature: float) -> None:
    """Raise unless scale is finite, and temperature and softcap are finite and positive."""
    if softcap is not None:
        check_real("softcap", softcap)
        if not 0 < softcap < float("inf"):
            raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    check_number("scale", scale)
    check_temperature(temperature)


def check_vocab_size(vocab_size: int | None, rows: int) -> None:
    """Raise unless V is an int from 1 to `rows`, the rows of the weight on all ranks."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral):
        raise TypeError(f"vocab_size: expected an int, got {got(vocab_size)}")
    if not 1 <= vocab_size <= rows:
        raise ValueError(
            f"vocab_size: expected 1 to {rows}, the rows of weight, got {vocab_size}; it counts "
            "the tokens, without the padding"
        )


def check_hidden_is_finite(hidden: Tensor) -> None:
    """Raise ValueError that names the rows with NaN or inf; waits for the device."""
    bad = ~torch.isfinite(hidden).all(-1)
    if bad.any():
        rows = [tuple(row) if len(row) > 1 else row[0] for row in bad.nonzero().tolist()]
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(
            f"hidden: expected finite numbers, got NaN or inf in {len(rows)} row(s): {shown}; "
            "look for an overflow in the model's forward pass"
        )


def check_k(k: int, vocab_size: int) -> None:
    """Raise unless k is an int from 1 to the size of the vocabulary."""
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {got(k)}")
    if not 1 <= k <= vocab_size:
        raise ValueError(
            f"k: expected 1 to {vocab_size}, the vocabulary, got {k}; for the exact divergence "
            'over all of it use support="full"'
        )


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise unless targets [...] hold one id for each row of hidden [..., D]."""
    check_token_ids("targets", targets)
    check_device("targets", targets, "hidden", hidden.device)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected one id a row, {tuple(hidden.shape[:-1])}, got "
            f"{tuple(targets.shape)}; select the same tokens from both"
        )


def check_ids(ids: Tensor, hidden: Tensor) -> None:
    """Raise unless ids [..., K] fit hidden [..., D], with K >= 1."""
    check_token_ids("ids", ids)
    check_device("ids", ids, "hidden", hidden.device)
    if ids.dim() < 1 or ids.shape[:-1] != hidden.shape[:-1] or ids.shape[-1] < 1:
        raise ValueError(
            "ids: expected [..., K] with K >= 1 and the leading shape of hidden, "
            f"{tuple(hidden.shape[:-1])}, got {tuple(ids.shape)}; add a last dimension for one id "
            "a row"
        )


def check_reverse_mode(*values: Any) -> None:
    """Raise RuntimeError if forward-mode AD or torch.func tracks one of the values.

    Custom operators and what runs under no_grad would drop a tangent.
    """
    if forward_ad._current_level >= 0:  # inside forward_ad.dual_level, jvp or jacfwd
        _Operands.apply(*(value for value in values if isinstance(value, Tensor)))
    if _are_functorch_transforms_active() and any(
        isinstance(value, Tensor) and is_gradtrackingtensor(value) for value in values
    ):
        raise RuntimeError(_REVERSE_MODE_ONLY)


class _Operands(torch.autograd.Function):
    """PyTorch calls its jvp, which raises, if an operand has a tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*operands: Tensor) -> Tensor:
        return operands[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_REVERSE_MODE_ONLY)

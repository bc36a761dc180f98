"""What LazyLogits refuses: operands, the scalars of a head, and supports that do not fit them."""

from numbers import Integral

import torch
from torch import Tensor

from opd_kernels.checks import (
    check_device,
    check_floating,
    check_number,
    check_real,
    check_temperature,
    check_token_ids,
    got,
)


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are [..., D], [V, D] and [V] of floating dtypes on one device."""
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, operand in operands.items():
        check_floating(name, operand, "cast or dequantise it first")
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


def check_scalars(softcap: float | None, scale: float, temperature: float) -> None:
    """Raise for what is no factor of logits."""
    if softcap is not None:
        check_real("softcap", softcap)
        if not 0 < softcap < float("inf"):
            raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    check_number("scale", scale)
    check_temperature(temperature)


def check_vocab_size(vocab_size: int | None, rows: int) -> None:
    """Raise unless V is a number of the weight's rows, those of all ranks."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral):
        raise TypeError(f"vocab_size: expected an int, got {got(vocab_size)}")
    if not 1 <= vocab_size <= rows:
        raise ValueError(
            f"vocab_size: expected 1 to {rows}, the rows of weight, got {vocab_size}; it counts "
            "the tokens, without the padding"
        )


def check_hidden_is_finite(hidden: Tensor) -> None:
    """Raise with the rows that hold NaN or inf."""
    bad = ~torch.isfinite(hidden).all(-1)
    if bad.any():
        rows = [tuple(row) if len(row) > 1 else row[0] for row in bad.nonzero().tolist()]
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(
            f"hidden: expected finite numbers, got NaN or inf in {len(rows)} row(s): {shown}; "
            "look for an overflow in the model's forward pass"
        )


def check_k(k: int, vocab_size: int) -> None:
    """Raise if no support of k ids fits the vocabulary."""
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {got(k)}")
    if not 1 <= k <= vocab_size:
        raise ValueError(
            f"k: expected 1 to {vocab_size}, the vocabulary, got {k}; for the exact divergence "
            'over all of it use support="full"'
        )


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise unless there is one id [...] for each row of hidden [..., D]."""
    check_token_ids("targets", targets)
    check_device("targets", targets, "hidden", hidden.device)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected one id a row, {tuple(hidden.shape[:-1])}, got "
            f"{tuple(targets.shape)}; select the same tokens from both"
        )


def check_ids(ids: Tensor, hidden: Tensor) -> None:
    """Raise if ids [..., K] are no support for hidden [..., D]."""
    check_token_ids("ids", ids)
    check_device("ids", ids, "hidden", hidden.device)
    if ids.dim() < 1 or ids.shape[:-1] != hidden.shape[:-1] or ids.shape[-1] < 1:
        raise ValueError(
            "ids: expected [..., K] with K >= 1 and the leading shape of hidden, "
            f"{tuple(hidden.shape[:-1])}, got {tuple(ids.shape)}; add a last dimension for one id "
            "a row"
        )

"""Final logits from raw products inside a kernel; records.py defines the same for whole tensors.

A score is hidden @ weight.T + bias. A head is passed as two scalars: z = outer * tanh(inner *
score), or z = outer * score without a softcap. They are passed in double precision and rounded once
to the dtype of the computation.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh as in the Cephes library: a rational function near 0, where the formula with exp would
    lose relative precision. libdevice has a tanh, but Triton's interpreter does not.
    """
    a = tl.abs(x)
    s = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s
        p -= 1.61468768441708447952e3
        q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s
        q += 4.84406305325125486048e3
        small = x + x * s * (p / q)
    else:
        p = (-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2
        p = (p * s + 1.33314422036e-1) * s - 3.33332819422e-1
        small = x + x * s * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def scores_of(raw, bias, columns, live, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Scores at some columns of a row of raw products that starts at the pointer raw; 0 at columns
    that are not live.
    """
    scores = tl.load(raw + columns, mask=live, other=0.0).to(DTYPE)
    if HAS_BIAS:
        scores += tl.load(bias + columns, mask=live, other=0.0).to(DTYPE)
    return scores


@triton.jit
def logits_of(scores, inner, outer, CAPPED: tl.constexpr):
    """The final logits z of scores."""
    if CAPPED:
        return tanh(scores * inner) * outer
    return scores * outer


@triton.jit
def derivatives_of(scores, inner, outer, CAPPED: tl.constexpr):
    """dz / dscore. 1 - tanh^2 would cancel where the cap saturates; with e = exp(-2 |inner score|),
    4 e / (1 + e)^2 does not.
    """
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(scores * inner))
        return (4.0 * inner * outer) * e / ((1.0 + e) * (1.0 + e))
    return tl.zeros_like(scores) + outer

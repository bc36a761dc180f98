"""The running logsumexp of a row inside a kernel (Milakov and Gimelshein, arXiv 1805.02867).

total = sum exp(z - peak), and moment = sum exp(z - peak) * (z - peak), or of any other term that
has peak as its origin.
"""

import triton
import triton.language as tl


@triton.jit
def origin(peak):
    """What logits are taken relative to: peak, or 0 before the first finite one."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def carry(total, moment, gap):
    """Both sums when their origin moves by gap <= 0."""
    decay = tl.exp(gap)
    return total * decay, tl.where(decay == 0.0, 0.0, decay * (moment + total * gap))


@triton.jit
def absorb(z, block_peak, peak, total, moment, HAS_MOMENT: tl.constexpr, AXIS: tl.constexpr):
    """Take a block z [BLOCK] of one row (AXIS 0), or z [ROWS, COLUMNS] of several (AXIS 1), of
    which block_peak is the maximum, into peak, total and moment.
    """
    new_peak = tl.maximum(peak, block_peak)
    shift = origin(new_peak)
    z = z - shift if AXIS == 0 else z - shift[:, None]
    weights = tl.exp(z)
    if HAS_MOMENT:
        total, moment = carry(total, moment, peak - shift)
        moment += tl.sum(tl.where(weights == 0.0, 0.0, weights * z), axis=AXIS)
    else:
        total = total * tl.exp(peak - shift)
    return new_peak, total + tl.sum(weights, axis=AXIS), moment

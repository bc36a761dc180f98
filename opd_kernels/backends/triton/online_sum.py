"""Online logsumexp of a row inside a kernel (Milakov and Gimelshein, arXiv 1805.02867).

The state of a row is peak = max z, total = sum exp(z - peak) and moment = sum exp(z - peak) *
(z - peak), which the entropy needs. `carry` also works for a moment of other terms that are
relative to peak.
"""

import triton
import triton.language as tl


@triton.jit
def origin(peak):
    """The value that is subtracted from logits: peak, or 0 while there is no finite logit."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def carry(total, moment, gap):
    """Rescale total and moment to a new peak, where gap <= 0 is the old peak minus the new one."""
    decay = tl.exp(gap)
    return total * decay, tl.where(decay == 0.0, 0.0, decay * (moment + total * gap))


@triton.jit
def absorb(z, block_peak, peak, total, moment, HAS_MOMENT: tl.constexpr, AXIS: tl.constexpr):
    """Add a block of logits to peak, total and moment, and return them. The block is z [BLOCK] of
    one row (AXIS 0) or z [ROWS, COLUMNS] of several (AXIS 1), with the maximum block_peak per row.
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

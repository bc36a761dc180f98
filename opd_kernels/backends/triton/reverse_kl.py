"""reverse_kl: the top-K reverse KL of rows and its gradient, from both models' values on S.

With c = log p - log q and m = sum_S p c, the gradient is p (c - m) wrt the values on S and
-p_tail m wrt the tail. The loss is m + sum_S (q - p). Without stop-gradient the loss is m, and
c + 1 replaces c in the gradient. With a bucket the tail is one more slot, see ../../divergences.py.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.online_sum import origin


@triton.jit
def _log_probs(z, tail):
    """Log-probabilities of slots [ROWS, K] and tails [ROWS]. Subtracting the row's maximum first
    keeps the precision of large logits.
    """
    peak = origin(tl.maximum(tl.max(z, axis=1), tail))
    z, tail = z - peak[:, None], tail - peak
    log_total = tl.log(tl.sum(tl.exp(z), axis=1) + tl.exp(tail))
    return z - log_total[:, None], tail - log_total


@triton.jit
def reverse_kl_kernel(
    values,  # [n, k]
    tails,  # [n]
    teacher_values,  # [n, k]
    teacher_tails,  # [n]
    losses,  # [n]
    dvalues,  # [n, k]
    dtails,  # [n]
    rows,  # n
    k,
    STOP_GRADIENT: tl.constexpr,
    BUCKET: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,  # k, rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, K)
    live_rows = row < rows
    live = live_rows[:, None] & (slot < k)[None, :]
    place = row[:, None] * k + slot[None, :]
    empty = float("-inf")
    log_p, log_p_tail = _log_probs(
        tl.load(values + place, mask=live, other=empty),
        tl.load(tails + row, mask=live_rows, other=empty),
    )
    log_q, log_q_tail = _log_probs(
        tl.load(teacher_values + place, mask=live, other=empty),
        tl.load(teacher_tails + row, mask=live_rows, other=empty),
    )
    p, p_tail = tl.exp(log_p), tl.exp(log_p_tail)
    # A slot without mass adds 0 to the loss, even if its log-ratio is infinite. NaN of the teacher
    # stays NaN.
    c = tl.where((p == 0.0) & (log_q == log_q), 0.0, log_p - log_q)
    loss = tl.sum(p * c, axis=1)
    c_tail = tl.zeros_like(p_tail)
    if BUCKET:
        is_number = log_q_tail == log_q_tail
        c_tail = tl.where((p_tail == 0.0) & is_number, 0.0, log_p_tail - log_q_tail)
        loss += p_tail * c_tail
    mean = loss
    if not BUCKET:
        if STOP_GRADIENT:
            loss += tl.sum(tl.exp(log_q) - p, axis=1)
        else:
            c += 1.0
            mean += tl.sum(p, axis=1)
    gradient = tl.where(p == 0.0, 0.0, p * (c - mean[:, None]))
    tail_gradient = tl.where(p_tail == 0.0, 0.0, p_tail * (c_tail - mean))
    tl.store(losses + row, loss, mask=live_rows)
    tl.store(dvalues + place, gradient, mask=live)
    tl.store(dtails + row, tail_gradient, mask=live_rows)

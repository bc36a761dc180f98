"""The memory benchmark measures what it says, and holds the bounds that the README names."""

import pytest

from benchmarks.memory import MIB, measure, peak_extra_bytes


@pytest.mark.parametrize(("provider", "bound"), [("ours_recompute", 64), ("ours_one_pass", 256)])
def test_peak_extra_memory_at_a_large_vocabulary(provider, bound):
    """N = 1,024, V = 151,936: one logits tensor alone would be 594 MiB."""
    assert measure(provider, 1024, 256, 151_936) <= bound * MIB


def test_the_benchmark_sees_full_logits():
    logits = 256 * 50_000 * 4
    assert peak_extra_bytes("eager_full", 256, 64, 50_000) >= 2 * logits

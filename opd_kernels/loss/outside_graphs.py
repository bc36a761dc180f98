"""The walks over tokens for a compiled caller, whose graph they break: their gradient is computed
chunk by chunk. A module of its own, since torch.compiler.disable imports the compiler, which takes
a second.
"""

import torch

from opd_kernels.loss import strategy

_REASON = "one_pass and support='full' do not compile; method='recompute' with K ids does"
one_pass = torch.compiler.disable(strategy.one_pass_loss, reason=_REASON)
recompute_full = torch.compiler.disable(strategy.recompute_full_loss, reason=_REASON)

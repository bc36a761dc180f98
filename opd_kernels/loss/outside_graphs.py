"""The walks over tokens for a compiled caller, outside its graph: they compute gradients by chunks.

A separate module, since torch.compiler.disable imports the compiler, which takes a second.
"""

import torch

from opd_kernels.loss import token_walk

_REASON = "one_pass and support='full' do not compile; method='recompute' with K ids does"
one_pass_loss = torch.compiler.disable(token_walk.one_pass_loss, reason=_REASON)
recomputed_full_loss = torch.compiler.disable(token_walk.recomputed_full_loss, reason=_REASON)

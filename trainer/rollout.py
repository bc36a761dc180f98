"""Rollouts: completions sampled from a model's own distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from opd_kernels.integrations.transformers import causal_lm_of
from trainer.config import DistillationConfig


@dataclass(frozen=True)
class Completion:
    """A sampled completion: its ids, EOS included where it ended."""

    ids: list[int]
    truncated: bool  # stopped by max_completion_length, not by EOS


class Sampler:
    """Samples at the recipe's temperature and top_p; any of the model's EOS ids ends a completion."""

    def __init__(
        self, config: DistillationConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        eos = causal_lm_of(model).generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.eos_ids = {tokenizer.eos_token_id, *listed}
        self.pad_id = tokenizer.pad_token_id
        self.options = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            max_new_tokens=config.max_completion_length,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.eos_ids),
        )

    @torch.no_grad()
    def sample(
        self, model: nn.Module, prompts: Sequence[list[int]], seed: Sequence[int]
    ) -> list[Completion]:
        """One completion for each prompt, in one batch; repeatable by seed, whatever ran before.

        The model samples in eval mode with its KV cache, and is left in the mode it was in.
        """
        model = causal_lm_of(model)
        width = max(map(len, prompts))
        ids = [[self.pad_id] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        was_training, own_options = model.training, model.generation_config
        # What is unset would come from the model's own options: a repetition penalty is off-policy.
        model.generation_config = GenerationConfig()
        model.eval()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
                output = model.generate(
                    torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    generation_config=self.options,
                )
        finally:
            model.train(was_training)
            model.generation_config = own_options
        return [self.cut_after_eos(row) for row in output[:, width:].tolist()]

    def cut_after_eos(self, ids: list[int]) -> Completion:
        """The completion up to its first EOS, which is part of it; what follows is padding."""
        for position, token in enumerate(ids):
            if token in self.eos_ids:
                return Completion(ids[: position + 1], truncated=False)
        return Completion(ids, truncated=True)

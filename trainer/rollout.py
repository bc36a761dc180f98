"""Rollouts: completions sampled from a model's own distribution."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import BatchEncoding, GenerationConfig

from opd_kernels.integrations.transformers import causal_lm_of
from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.models import Model, Tokenizer, eval_mode


@dataclass(frozen=True)
class Completion:
    """A sampled completion of a prompt: its ids, EOS included where it ended."""

    prompt: Prompt
    ids: list[int]
    truncated: bool  # stopped by max_completion_length, not by EOS


class Sampler:
    """Samples from student and teacher alike: their common ids, ended by any EOS id of either."""

    def __init__(self, config: DistillationConfig, tokenizer: Tokenizer, *models: Model) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = {tokenizer.eos_token_id}
        for eos in (causal_lm_of(model).generation_config.eos_token_id for model in models):
            self.eos_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
        heads = [causal_lm_of(model).get_output_embeddings().weight.shape[0] for model in models]
        temperature = config.sampling_temperature or config.temperature
        sampling = {"temperature": temperature, "top_p": config.top_p, "top_k": 0}
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(self.eos_ids)}
        ends["suppress_tokens"] = list(range(min(heads), max(heads))) or None
        length = config.max_completion_length
        self.options = GenerationConfig(do_sample=True, max_new_tokens=length, **sampling, **ends)

    @torch.no_grad()
    def sample(
        self, model: Model, prompts: list[Prompt], *seed: int, as_teacher: bool = False
    ) -> list[Completion]:
        """One completion for each prompt, in one batch; repeatable by seed, whatever ran before.

        The model samples in eval mode with its KV cache, and is left in the mode it was in.
        """
        model = causal_lm_of(model)
        contexts = [p.teacher_ids if as_teacher else p.student_ids for p in prompts]
        inputs = BatchEncoding({"input_ids": contexts})
        inputs = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt")
        own_options, on_gpu = model.generation_config, model.device.type != "cpu"
        # What is unset would come from the model's own options: a repetition penalty is off-policy.
        model.generation_config = GenerationConfig()
        try:
            with eval_mode(model), torch.random.fork_rng([model.device] * on_gpu):
                torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
                output = model.generate(**inputs.to(model.device), generation_config=self.options)
        finally:
            model.generation_config = own_options
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self.cut_after_eos(p, row) for p, row in zip(prompts, rows, strict=True)]

    def cut_after_eos(self, prompt: Prompt, ids: list[int]) -> Completion:
        """The completion up to its first EOS, which is part of it; what follows is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.eos_ids]
        return Completion(prompt, ids[: ends[0] + 1] if ends else ids, truncated=not ends)

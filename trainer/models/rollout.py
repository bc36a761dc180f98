"""Rollouts: completions sampled from a model's own distribution."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchEncoding, GenerationConfig

from opd_kernels.integrations.transformers import causal_lm_of
from trainer.config import StageConfig
from trainer.data import Prompt
from trainer.errors import limits_memory
from trainer.models.load import Model, Tokenizer, eval_mode, is_fsdp


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt: its ids, EOS included where it ended."""

    prompt: Prompt
    ids: list[int]
    truncated: bool  # stopped by max_completion_length, not by EOS
    log_probs: list[float] | None = None  # of its ids, by the policy that sampled them
    reward: float = 0.0
    advantage: float = 0.0  # of the reward over the prompt's other completions

    @property
    def context_length(self) -> int:
        """Its tokens and those of the longer of both models' prompts."""
        return max(len(self.prompt.student_ids), len(self.prompt.teacher_ids)) + len(self.ids)

    def first(self, tokens: int | None) -> "Completion":
        """The completion up to so many tokens."""
        log_probs = None if self.log_probs is None else self.log_probs[:tokens]
        return replace(self, ids=self.ids[:tokens], log_probs=log_probs)


class Sampler:
    """Samples from student and teacher alike: their common ids, ended by any EOS id of either."""

    def __init__(self, config: StageConfig, tokenizer: Tokenizer, *models: Model) -> None:
        self.tokenizer = tokenizer
        self.batch_size, self.quiet = config.rollout_batch_size, config.disable_tqdm
        self.eos_ids = {tokenizer.eos_token_id}
        for eos in (causal_lm_of(model).generation_config.eos_token_id for model in models):
            self.eos_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
        heads = [causal_lm_of(model).get_output_embeddings().weight.shape[0] for model in models]
        temperature = config.sampling_temperature or config.temperature
        sampling = {"temperature": temperature, "top_p": config.top_p, "top_k": 0}
        # A broken model's NaN would end the program; so the step's loss shows it, and is left out.
        sampling["remove_invalid_values"] = True
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(self.eos_ids)}
        ends["suppress_tokens"] = list(range(min(heads), max(heads))) or None
        length = config.max_completion_length
        self.options = GenerationConfig(do_sample=True, max_new_tokens=length, **sampling, **ends)
        self.greedy_options = GenerationConfig(do_sample=False, max_new_tokens=length, **ends)

    def sample(
        self,
        model: Model,
        prompts: list[Prompt],
        *seed: int,
        as_teacher: bool = False,
        greedy: bool = False,
    ) -> list[Completion]:
        """One completion for each prompt, in its order; repeatable by seed, whatever ran before.

        Prompts of similar length are sampled together, so that little is padded.
        """
        contexts = [p.teacher_ids if as_teacher else p.student_ids for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(contexts[i]))
        starts = range(0, len(order), self.batch_size)
        rows: dict[int, list[int]] = {}
        for first in tqdm(starts, "rollout", leave=False, disable=self.quiet or len(starts) == 1):
            batch = order[first : first + self.batch_size]
            batch_seed = np.random.SeedSequence([*seed, first]).generate_state(1, np.uint64)[0]
            options = self.greedy_options if greedy else self.options
            own = [contexts[i] for i in batch]
            with limits_memory("rollout_batch_size, max_completion_length"):
                answers = self._generate(model, own, options, int(batch_seed))
            rows.update(zip(batch, answers, strict=True))
        return [self.cut_after_eos(p, rows[i]) for i, p in enumerate(prompts)]

    @torch.no_grad()
    def _generate(
        self, model: Model, contexts: list[list[int]], options: GenerationConfig, seed: int
    ) -> list[list[int]]:
        """The ids that follow each context, in eval mode with a KV cache."""
        model = causal_lm_of(model)
        inputs = BatchEncoding({"input_ids": contexts})
        inputs = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt")
        own_options, on_gpu = model.generation_config, model.device.type != "cpu"
        # What is unset would come from the model's own options: a repetition penalty is off-policy.
        model.generation_config = GenerationConfig()
        try:
            with eval_mode(model), torch.random.fork_rng([model.device] * on_gpu):
                torch.manual_seed(seed)
                inputs = inputs.to(model.device)
                # FSDP gathers the weights for each token from all ranks, until the last has ended.
                output = model.generate(
                    **inputs, generation_config=options, synced_gpus=is_fsdp(model)
                )
        finally:
            model.generation_config = own_options
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def cut_after_eos(self, prompt: Prompt, ids: list[int]) -> Completion:
        """The completion up to its first EOS, which is part of it; what follows is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.eos_ids]
        return Completion(prompt, ids[: ends[0] + 1] if ends else ids, truncated=not ends)

    def text(self, completion: Completion) -> str:
        """What a reader or a scorer sees of a completion."""
        return self.tokenizer.decode(completion.ids, skip_special_tokens=True)

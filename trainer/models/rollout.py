"""Rollouts: completions sampled from a model."""

from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchEncoding, GenerationConfig

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import StageConfig
from opd_trainer.data import Prompt
from opd_trainer.errors import name_memory_keys
from opd_trainer.models.load import Model, Tokenizer, eval_mode, is_fsdp
from opd_trainer.run.console import hides_bars


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt."""

    prompt: Prompt
    ids: list[int]  # with EOS, unless truncated
    truncated: bool  # stopped by max_completion_length, not by EOS
    log_probs: list[float] | None = None  # of the ids, by the policy that sampled them
    reward: float = 0.0
    advantage: float | None = None  # of a reward over the prompt's other completions

    @property
    def context_length(self) -> int:
        """The number of tokens of the completion and the longer of its two prompts."""
        return max(len(self.prompt.student_ids), len(self.prompt.teacher_ids)) + len(self.ids)

    def first(self, tokens: int | None) -> "Completion":
        """Return the completion cut to its first tokens."""
        log_probs = None if self.log_probs is None else self.log_probs[:tokens]
        return replace(self, ids=self.ids[:tokens], log_probs=log_probs)


class Sampler:
    """Samples from student and teacher alike: ids that both have, until an EOS id of either."""

    def __init__(self, config: StageConfig, tokenizer: Tokenizer, *models: Model) -> None:
        self.tokenizer = tokenizer
        self.batch_size, self.hides_bars = config.rollout_batch_size, hides_bars(config)
        self.eos_ids = {tokenizer.eos_token_id}
        for eos in (causal_lm_of(model).generation_config.eos_token_id for model in models):
            self.eos_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
        sizes = [causal_lm_of(model).get_output_embeddings().weight.shape[0] for model in models]
        temperature = config.sampling_temperature or config.temperature
        sampling = {"temperature": temperature, "top_p": config.top_p, "top_k": 0}
        # NaN from a broken model would end the program in generate(). It also shows in the loss of
        # the step, which is then skipped.
        sampling["remove_invalid_values"] = True
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(self.eos_ids)}
        ends["suppress_tokens"] = list(range(min(sizes), max(sizes))) or None
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
        """Return a completion per prompt, in their order; the seed alone determines the samples.

        Prompts of similar length are batched together to save padding.
        """
        contexts = [p.teacher_ids if as_teacher else p.student_ids for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(contexts[i]))
        starts = range(0, len(order), self.batch_size)
        ids: dict[int, list[int]] = {}
        hides_bar = len(starts) == 1 or self.hides_bars
        for start in tqdm(starts, "rollout", leave=False, disable=hides_bar):
            batch = order[start : start + self.batch_size]
            batch_seed = np.random.SeedSequence([*seed, start]).generate_state(1, np.uint64)[0]
            options = self.greedy_options if greedy else self.options
            inputs = [contexts[i] for i in batch]
            with name_memory_keys("rollout_batch_size, max_completion_length"):
                generated = self._generate(model, inputs, options, int(batch_seed))
            ids.update(zip(batch, generated, strict=True))
        return [self.cut_after_eos(p, ids[i]) for i, p in enumerate(prompts)]

    @torch.no_grad()
    def _generate(
        self, model: Model, contexts: list[list[int]], options: GenerationConfig, seed: int
    ) -> list[list[int]]:
        """Return the ids that follow each context, sampled in eval mode with a KV cache."""
        model = causal_lm_of(model)
        inputs = BatchEncoding({"input_ids": contexts})
        inputs = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt")
        is_gpu = model.device.type != "cpu"
        # generate() takes unset options from the model's: a repetition penalty would be off-policy.
        no_options = patch.object(model, "generation_config", GenerationConfig())
        with no_options, eval_mode(model), torch.random.fork_rng([model.device] * is_gpu):
            torch.manual_seed(seed)
            inputs = inputs.to(model.device)
            # FSDP gathers the weights from all ranks for each token, so all ranks generate until
            # the last one has ended.
            output = model.generate(**inputs, generation_config=options, synced_gpus=is_fsdp(model))
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def cut_after_eos(self, prompt: Prompt, ids: list[int]) -> Completion:
        """Return the completion up to and including its first EOS; the rest is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.eos_ids]
        return Completion(prompt, ids[: ends[0] + 1] if ends else ids, truncated=not ends)

    def text(self, completion: Completion) -> str:
        """Return the completion as a reader or a scorer sees it."""
        return self.tokenizer.decode(completion.ids, skip_special_tokens=True)

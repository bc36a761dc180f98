"""Rollouts: completions sampled from a model."""

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import StageConfig
from opd_trainer.data import Prompt
from opd_trainer.errors import name_memory_keys
from opd_trainer.models.load import Model, Tokenizer, eos_ids_of, eval_mode, is_fsdp
from opd_trainer.run.console import hides_bars


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt."""

    prompt: Prompt
    ids: list[int]  # with EOS, unless truncated
    truncated: bool  # stopped by max_completion_length, not by EOS
    log_probs: list[float] | None = None  # of the ids, by the engine that sampled them
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


# The ids that follow a context, and their log-probs where the engine has them.
Generated = tuple[list[int], list[float] | None]


class Sampler:
    """Samples from student and teacher alike: ids that both have, until an EOS id of either."""

    def __init__(self, config: StageConfig, tokenizer: Tokenizer, *models: Model) -> None:
        self.tokenizer = tokenizer
        self.batch_size, self.hides_bars = config.rollout_batch_size, hides_bars(config)
        sizes = [causal_lm_of(model).get_output_embeddings().weight.shape[0] for model in models]
        eos_ids = frozenset({tokenizer.eos_token_id}.union(*map(eos_ids_of, models)))
        self.eos_ids = frozenset(i for i in eos_ids if i < min(sizes, default=i + 1))
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
        generated: dict[int, Generated] = {}
        hides_bar = len(starts) == 1 or self.hides_bars
        for start in tqdm(starts, "rollout", leave=False, disable=hides_bar):
            batch = order[start : start + self.batch_size]
            batch_seed = np.random.SeedSequence([*seed, start]).generate_state(1, np.uint64)[0]
            options = self.greedy_options if greedy else self.options
            inputs = [contexts[i] for i in batch]
            with name_memory_keys("rollout_batch_size, max_completion_length"):
                outputs = self._generate(model, inputs, options, int(batch_seed))
            generated.update(zip(batch, outputs, strict=True))
        return [self._completion(p, *generated[i]) for i, p in enumerate(prompts)]

    def _completion(
        self, prompt: Prompt, ids: list[int], log_probs: list[float] | None
    ) -> Completion:
        """Return the completion up to and including its first EOS, with its log-probs."""
        completion = self.cut_after_eos(prompt, ids)
        return replace(completion, log_probs=log_probs).first(len(completion.ids))

    @torch.no_grad()
    def _generate(
        self, model: Model, contexts: list[list[int]], options: GenerationConfig, seed: int
    ) -> list[Generated]:
        """Return what follows each context, sampled in eval mode with a KV cache."""
        model = causal_lm_of(model)
        inputs = BatchEncoding({"input_ids": contexts})
        inputs = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt")
        is_gpu = model.device.type != "cpu"
        # generate() takes unset options from the model's: a repetition penalty would be off-policy.
        no_options = patch.object(model, "generation_config", GenerationConfig())
        fixed_rng = torch.random.fork_rng([model.device] * is_gpu)
        recorder, arguments = None, dict[str, Any]()
        if options.do_sample:
            recorder = _LogProbs(options.temperature, options.top_p)
            arguments = {"logits_processor": LogitsProcessorList([recorder])}
            options = copy(options)
            options.temperature = options.top_p = 1.0  # the recorder applies both
        with no_options, _without_router_loss(model), eval_mode(model), fixed_rng:
            torch.manual_seed(seed)
            inputs = inputs.to(model.device)
            # FSDP gathers the weights from all ranks for each token, so all ranks generate until
            # the last one has ended.
            arguments |= {"generation_config": options, "synced_gpus": is_fsdp(model)}
            output = model.generate(**inputs, **arguments)
        ids = output[:, inputs["input_ids"].shape[1] :]
        log_probs = recorder.log_probs(ids) if recorder else [None] * len(ids)
        return list(zip(ids.tolist(), log_probs, strict=True))

    def cut_after_eos(self, prompt: Prompt, ids: list[int]) -> Completion:
        """Return the completion up to and including its first EOS; the rest is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.eos_ids]
        return Completion(prompt, ids[: ends[0] + 1] if ends else ids, truncated=not ends)

    def text(self, completion: Completion) -> str:
        """Return the completion as a reader or a scorer sees it."""
        # A token that ends turns need not be a special one, which the tokenizer would skip.
        ids = completion.ids if completion.truncated else completion.ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class _LogProbs(LogitsProcessor):
    """Tempers the logits as generate() would, and records the log-probs of what it samples.

    generate() itself can only keep the logits of all tokens, [tokens, batch, vocabulary].
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.scores: Tensor | None = None  # [B, V] that the next tokens are sampled from
        self.recorded: list[Tensor] = []  # [B] of each token but the last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is not None:
            self.recorded.append(self._of(input_ids[:, -1]))
        self.scores = self.warpers(input_ids, scores)
        return self.scores

    def _of(self, ids: Tensor) -> Tensor:
        assert self.scores is not None
        return self.scores.gather(-1, ids[:, None])[:, 0] - self.scores.logsumexp(-1)

    def log_probs(self, ids: Tensor) -> list[list[float]]:
        """Return the log-probs of the generated ids [B, T]."""
        length = ids.shape[1]
        if len(self.recorded) < length:  # not where generate() took back tokens after the end
            self.recorded.append(self._of(ids[:, -1]))
        return torch.stack(self.recorded[:length], dim=1).tolist()


def _without_router_loss(model: Model) -> AbstractContextManager[Any]:
    """Do not let a mixture of experts compute its auxiliary loss, which fails on a KV cache."""
    config = model.config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    return patch.object(config, "output_router_logits", False) if has_router else nullcontext()

"""Rollouts by vLLM in this process, with the student's current weights.

vLLM needs its own environment; `make test-vllm` shows how to install it.
"""

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GenerationConfig

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import StageConfig
from opd_trainer.models.load import Model, Tokenizer, limits_of
from opd_trainer.models.rollout import Generated, Sampler

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # keeps the engine in this process
from vllm import LLM, CompletionOutput, SamplingParams


class VLLMSampler(Sampler):
    """Samples from the student by vLLM, and from other models by transformers."""

    def __init__(
        self, config: StageConfig, tokenizer: Tokenizer, student: Model, *others: Model
    ) -> None:
        super().__init__(config, tokenizer, student, *others)
        if config.world_size > 1:
            raise ValueError("rollout_engine: vllm is for a single process; use transformers")
        self.student = causal_lm_of(student)
        set_num_threads = torch.set_num_threads
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            self.student.save_pretrained(folder, state_dict=dict(merged_weights(self.student)))
            tokenizer.save_pretrained(folder)
            self.engine = LLM(
                folder,
                dtype=str(self.student.dtype).removeprefix("torch."),
                enforce_eager=True,
                max_model_len=limits_of(student).context,
                # Log-probs of the distribution that it samples from: tempered, and cut by top_p.
                logprobs_mode="processed_logprobs",
            )
        torch.set_num_threads = set_num_threads  # vLLM replaces it by a no-op

    def _generate(
        self, model: Model, contexts: list[list[int]], options: GenerationConfig, seed: int
    ) -> list[Generated]:
        if causal_lm_of(model) is not self.student:
            return super()._generate(model, contexts, options, seed)
        with torch.no_grad():
            weights = merged_weights(self.student)
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.engine.reset_prefix_cache():  # it holds results of the old weights
            raise RuntimeError("vLLM's prefix cache could not be reset")
        seeds = np.random.SeedSequence(seed).generate_state(len(contexts)).tolist()
        suppressed = options.suppress_tokens
        allowed = list(range(min(suppressed))) if suppressed else None
        parameters = [
            SamplingParams(
                temperature=options.temperature if options.do_sample else 0.0,
                top_p=options.top_p if options.do_sample else 1.0,
                seed=request_seed,
                max_tokens=options.max_new_tokens,
                stop_token_ids=options.eos_token_id,
                allowed_token_ids=allowed,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for request_seed in seeds
        ]
        prompts = [{"prompt_token_ids": ids} for ids in contexts]
        with torch.random.fork_rng():  # vLLM advances the global RNG despite the seeds
            outputs = self.engine.generate(prompts, parameters, use_tqdm=False)
        best = [output.outputs[0] for output in outputs]
        return [(list(c.token_ids), _log_probs(c) if options.do_sample else None) for c in best]


def _log_probs(completion: CompletionOutput) -> list[float]:
    """Return the log-probs of a completion's tokens."""
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return [found[token].logprob for found, token in pairs]


def merged_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's weights by name, with its active LoRA adapters merged in."""
    adapted = {name: x for name, x in model.named_modules() if isinstance(x, LoraLayer)}
    for name, tensor in model.state_dict().items():
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None and not layer.disable_adapters:
            tensor = tensor + sum(layer.get_delta_weight(a) for a in layer.active_adapters)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor

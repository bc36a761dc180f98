"""A teacher behind an OpenAI-compatible completions endpoint that takes token ids and returns the
log-probabilities of the prompt, as vLLM's does (`prompt_logprobs`).
"""

import os
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import torch

from opd_kernels import SparseLogits
from trainer.config import TeacherConfig
from trainer.rollout import Completion
from trainer.teacher import TeacherError

KEY = "OPD_TEACHER_API_KEY"  # an environment variable; the key is nowhere else
_TRANSIENT = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
_Row = list[tuple[int, float]]  # a position's token ids and log-probabilities, the best first


class ServedTeacher:
    """Scores completions by requests in threads; every answer is checked before it is used.

    What a restart or a moment may mend is tried again until `teacher_patience` seconds are over:
    connections, time-outs, 429, 5xx, and answers that are not what was asked for.
    """

    def __init__(self, url: str, config: TeacherConfig, vocab_size: int) -> None:
        self.url, self.k, self.vocab_size = url, config.k, vocab_size
        self.patience = config.teacher_patience
        self.key = os.environ.get(KEY, "none")
        self.client = openai.OpenAI(
            base_url=url, api_key=self.key, timeout=config.teacher_timeout, max_retries=0
        )
        self.pool = ThreadPoolExecutor(config.teacher_concurrency)
        self.answers: dict[tuple[int, ...], Future[list[_Row]]] = {}
        models = list(self._patiently(self.client.models.list, lambda answer: answer.data))
        self.model = config.teacher_model or models[0].id
        limits = [x.model_extra or {} for x in models if x.id == self.model]
        if not limits:
            names = ", ".join(x.id for x in models)
            raise TeacherError(f"teacher_model: expected one of {names}, got {self.model!r}")
        self.context = limits[0].get("max_model_len") or sys.maxsize
        self._score([0], [0])  # fails now if the server does not answer so many log-probs

    def prepare(self, completions: list[Completion]) -> None:
        """Ask for all of a step's completions at once."""
        self.answers = {
            (*c.prompt.teacher_ids, *c.ids): self.pool.submit(
                self._score, c.prompt.teacher_ids, c.ids
            )
            for c in completions
        }

    def logits(self, completions: list[Completion], temperature: float) -> SparseLogits:
        """See Teacher: the K best of every position, and the token itself; temperature is 1."""
        assert temperature == 1
        keys = [(*c.prompt.teacher_ids, *c.ids) for c in completions]
        try:
            rows = [row for key in keys for row in self.answers[key].result()]
        except TeacherError:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ids = torch.full((len(rows), self.k + 1), -1)
        log_probs = torch.full((len(rows), self.k + 1), -torch.inf)
        for n, row in enumerate(rows):
            for slot, (token, log_prob) in enumerate(row):
                ids[n, slot], log_probs[n, slot] = token, log_prob
        return SparseLogits.from_log_probs(
            log_probs.to(device), ids.to(device), vocab_size=self.vocab_size
        )

    def _score(self, prompt: list[int], completion: list[int]) -> list[_Row]:
        ids = [*prompt, *completion]

        def ask() -> Any:
            return self.client.completions.create(
                model=self.model, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": self.k}
            )

        def check(answer: Any) -> list[_Row]:
            choice = answer.choices[0].model_extra or {}
            rows = (choice.get("prompt_logprobs") or [])[len(prompt) :]
            if len(rows) != len(completion):
                raise ValueError(f"prompt_logprobs of {len(rows)} tokens for {len(completion)}")
            return [self._row(x, token) for x, token in zip(rows, completion, strict=True)]

        return self._patiently(ask, check)

    def _row(self, raw: dict[str, Any], token: int) -> _Row:
        """A position's K best and its own token; anything else is no answer to the question."""
        found = {int(i): float(x["logprob"]) for i, x in raw.items()}
        best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
        if token not in found or not self.k <= len(found) <= self.k + 1:
            raise ValueError(f"expected {self.k} log-probs and the token's own, got {len(found)}")
        if not all(i >= 0 and x <= 1e-3 for i, x in best):
            raise ValueError("expected ids from 0 and log-probs up to 0")
        mass = torch.tensor([x for _, x in best]).exp().sum()
        if not mass < 1.01:
            raise ValueError(f"expected probabilities with a sum of at most 1, got {mass:.3f}")
        return best

    def _patiently(self, ask: Any, check: Any) -> Any:
        """check(ask()), again and again while it may still come right."""
        end, wait = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return check(ask())
            except openai.AuthenticationError:
                reason = f"expected a valid key in the environment variable {KEY}"
                raise TeacherError(f"teacher: {self.url} refused the API key; {reason}") from None
            except (*_TRANSIENT, AttributeError, KeyError, TypeError, ValueError, IndexError) as e:
                if time.monotonic() > end:
                    raise TeacherError(
                        f"teacher: no good answer from {self.url} for {self.patience} s "
                        f"(teacher_patience); the last one: {self._without_key(e)}"
                    ) from None
            except openai.APIError as error:
                raise TeacherError(
                    f"teacher: {self.url} refused the request: {self._without_key(error)}; if it "
                    f"limits log-probs below k: {self.k}, start it with a higher --max-logprobs"
                ) from None
            time.sleep(wait * random.uniform(0.5, 1))  # so that requests do not come all at once
            wait = min(2 * wait, 10.0)

    def _without_key(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}".replace(self.key, "***")[:300]

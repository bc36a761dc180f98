"""A teacher behind an OpenAI-compatible completions endpoint that takes token ids and returns the
log-probabilities of the prompt, as vLLM's does (`prompt_logprobs`).
"""

import json
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2
import openai
import torch

from opd_kernels import SparseLogits
from trainer.config import TeacherConfig
from trainer.data import Limits
from trainer.errors import TeacherError
from trainer.models.load import Tokenizer
from trainer.models.rollout import Completion

KEY = "OPD_TEACHER_API_KEY"  # an environment variable; of one of several teachers, _ and its name
_PROBE = "What is 6 x 7? It's 42: def f(x): return x**2  # \u00e7a va, \u65e5\u672c"
_TRANSIENT = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
_TRANSIENT_STATUS = (408, 409)
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, IndexError)
_ANSWER_BYTES, _LOG_PROB_BYTES = 1 << 20, 256  # several times of what an answer and a log-prob take
_Row = list[tuple[int, float]]  # a position's token ids and log-probabilities, the best first
T = TypeVar("T")


class ServedTeacher:
    """Scores completions by requests in threads; every answer is checked before it is used.

    What a restart or a moment may mend is tried again until `teacher_patience` seconds are over:
    connections, time-outs, 429, 5xx, and answers that are not what was asked for.
    """

    def __init__(
        self, url: str, config: TeacherConfig, tokenizer: Tokenizer, vocab_size: int, name: str = ""
    ) -> None:
        self.url, self.k, self.vocab_size, self.device = url, config.k, vocab_size, config.device
        self.patience, self.timeout = config.teacher_patience, config.teacher_timeout
        self.warned = False
        self.key_name = f"{KEY}_{name.upper()}" if name else KEY
        self.key = os.environ.get(self.key_name, "").strip() or "none"
        # Without compression, which a small answer could hide a large one in.
        http_client = openai.DefaultHttpxClient(
            headers={"Accept-Encoding": "identity"}, event_hooks={"response": [self._limit]}
        )
        self.client = openai.OpenAI(
            base_url=url, api_key=self.key, timeout=config.teacher_timeout, max_retries=0,
            http_client=http_client,
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(config.teacher_concurrency)
        self.answers: dict[tuple[tuple[int, ...], tuple[int, ...]], Future[list[_Row]]] = {}
        models = list(self._patiently(self.client.models.list, lambda answer: answer.data))
        self.model = config.teacher_model or models[0].id
        listed = [x.model_extra or {} for x in models if x.id == self.model]
        if not listed:
            names = ", ".join(x.id for x in models)
            raise TeacherError(f"teacher_model: expected one of {names}, got {self.model!r}")
        context = (listed[0].get("max_model_len") or sys.maxsize) - 1  # it generates a token
        self.limits = Limits(context, ids=sys.maxsize)  # which it does not tell
        self._check_tokens(tokenizer)

    def _check_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise unless it answers so many log-probs, of the ids that the student has for a text."""
        ours = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        answer = self._patiently(lambda: self._ask(_PROBE, 0), lambda answer: answer)
        own = self._patiently(lambda: self._ask(ours, self.k), lambda answer: answer)
        try:
            theirs = [next(iter(row)) for row in _prompt_log_probs(answer)[1:]]
            self._rows(own, ours[:1], ours[1:])
        except _MALFORMED as error:
            raise TeacherError(
                f"teacher: {self.url} does not answer prompt_logprobs as vLLM does: "
                f"{self._without_key(error)}"
            ) from None
        if theirs != [str(token) for token in ours[1:]]:
            raise TeacherError(
                f"teacher: expected the student's tokenizer, but {self.url} has other ids for "
                f"{_PROBE!r}; serve a model of the student's family"
            )

    def prepare(self, completions: list[Completion]) -> None:
        """Ask for all of a step's completions at once, but for those that the last step had."""
        before, self.answers = self.answers, {}
        for c in completions:
            key = _key(c)
            self.answers[key] = before.get(key) or self.pool.submit(self._score, *key)

    def logits(self, completions: list[Completion], temperature: float) -> SparseLogits:
        """See Teacher: the K best of every position, and the token itself; temperature is 1."""
        assert temperature == 1
        try:
            rows = [row for c in completions for row in self.answers[_key(c)].result()]
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        ids = torch.full((len(rows), self.k + 1), -1)
        log_probs = torch.full((len(rows), self.k + 1), -torch.inf)
        for n, row in enumerate(rows):
            for slot, (token, log_prob) in enumerate(row):
                ids[n, slot], log_probs[n, slot] = token, log_prob
        return SparseLogits.from_log_probs(
            log_probs.to(self.device), ids.to(self.device), vocab_size=self.vocab_size
        )

    def _score(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[_Row]:
        ids = [*prompt, *completion]
        return self._patiently(
            lambda: self._ask(ids, self.k), lambda answer: self._rows(answer, prompt, completion)
        )

    def _ask(self, prompt: list[int] | str, k: int) -> Any:
        body = {"prompt_logprobs": k, "add_special_tokens": False}
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=1, extra_body=body
        )

    def _limit(self, response: httpx2.Response) -> None:
        """Before its body is read: no more of it than a right one could have, and no longer."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise httpx2.DecodingError("expected an answer without compression")
        prompt = json.loads(response.request.content or "{}").get("prompt", "")
        most = _ANSWER_BYTES + _LOG_PROB_BYTES * (self.k + 2) * len(prompt)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _LimitedStream(response.stream, most, self.timeout)

    def _rows(self, answer: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[_Row]:
        rows = _prompt_log_probs(answer)[len(prompt) :]
        if len(rows) != len(completion):
            raise ValueError(f"prompt_logprobs of {len(rows)} tokens for {len(completion)}")
        return [self._row(x, token) for x, token in zip(rows, completion, strict=True)]

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

    def _patiently(self, ask: Callable[[], Any], check: Callable[[Any], T]) -> T:
        """check(ask()), again and again while it may still come right and the program goes on."""
        end, wait = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return check(ask())
            except openai.AuthenticationError:
                reason = f"expected a valid key in the environment variable {self.key_name}"
                raise TeacherError(f"teacher: {self.url} refused the API key; {reason}") from None
            except openai.NotFoundError:
                raise TeacherError(
                    f"teacher: {self.url} has no such page; expected http(s)://HOST/v1 of an "
                    "OpenAI-compatible server"
                ) from None
            except (openai.APIError, *_MALFORMED) as error:
                reason = self._without_key(error)
                passes = isinstance(error, (*_TRANSIENT, *_MALFORMED))
                if not passes and getattr(error, "status_code", 0) not in _TRANSIENT_STATUS:
                    raise TeacherError(
                        f"teacher: {self.url} refused the request: {reason}; if it limits "
                        f"log-probs below k: {self.k}, start it with a higher --max-logprobs"
                    ) from None
                if time.monotonic() > end or not threading.main_thread().is_alive():
                    raise TeacherError(
                        f"teacher: no good answer from {self.url} for {self.patience} s "
                        f"(teacher_patience); the last one: {reason}"
                    ) from None
                if not self.warned:
                    self.warned = True
                    warnings.warn(f"teacher: {self.url} is asked again: {reason}", stacklevel=2)
            time.sleep(wait * random.uniform(0.5, 1))  # so that requests do not come all at once
            wait = min(2 * wait, 10.0)

    def _without_key(self, error: Exception) -> str:
        causes = f" ({error.__cause__})" if error.__cause__ else ""
        return f"{type(error).__name__}: {error}{causes}".replace(self.key, "***")[:300]


class _LimitedStream(httpx2.SyncByteStream):
    """A body of so many bytes at most, within so many seconds."""

    def __init__(self, stream: httpx2.SyncByteStream, most: int, seconds: float) -> None:
        self.stream, self.left, self.seconds = stream, most, seconds
        self.end = time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        for part in self.stream:
            self.left -= len(part)
            if self.left < 0:
                raise httpx2.ReadError("the answer is larger than any right one")
            if time.monotonic() > self.end:
                raise httpx2.ReadTimeout(f"the answer takes longer than {self.seconds} s")
            yield part

    def close(self) -> None:
        self.stream.close()


def _key(completion: Completion) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(completion.prompt.teacher_ids), tuple(completion.ids)


def _prompt_log_probs(answer: Any) -> list[dict[str, Any]]:
    """By position; of the first there are none."""
    return (answer.choices[0].model_extra or {}).get("prompt_logprobs") or []

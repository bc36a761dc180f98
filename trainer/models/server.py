"""A teacher behind an OpenAI-compatible completions endpoint that takes token ids and returns the
log-probabilities of the prompt, as vLLM does (`prompt_logprobs`).
"""

import json
import math
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2
import openai
import torch

from opd_kernels import SparseLogits
from opd_trainer.config import TeacherConfig
from opd_trainer.data import Limits
from opd_trainer.errors import TeacherError
from opd_trainer.models.load import Tokenizer
from opd_trainer.models.rollout import Completion

KEY = "OPD_TEACHER_API_KEY"  # environment variable; with _NAME for one of several teachers
_PROBE = "What is 6 x 7? It's 42: def f(x): return x**2  # \u00e7a va, \u65e5\u672c"
_TRANSIENT_STATUS = (408, 409, 429)  # and those from 500
_PADDING_LOG_PROB = math.log(1e-3)  # padding, which is never trained, stays below
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, IndexError)
_MAX_ANSWER_BYTES, _MAX_LOG_PROB_BYTES = 1 << 20, 256  # several times what a valid answer takes
_Row = list[tuple[int, float]]  # token ids and log-probabilities of a position, the best first
T = TypeVar("T")


class ServedTeacher:
    """Scores completions by requests in threads; every answer is validated before it is used.

    Failures that a restart may mend are retried for `teacher_patience` seconds: connections,
    time-outs, status 429 and 5xx, and malformed answers.
    """

    def __init__(
        self, url: str, config: TeacherConfig, tokenizer: Tokenizer, vocab_size: int, name: str = ""
    ) -> None:
        self.url, self.k, self.vocab_size, self.device = url, config.k, vocab_size, config.device
        self.patience, self.timeout = config.teacher_patience, config.teacher_timeout
        self.has_warned = False
        self.key_name = f"{KEY}_{name.upper()}" if name else KEY
        self.key = os.environ.get(self.key_name, "").strip() or "none"
        # No compression: a small answer could then unpack to a huge one.
        headers = {"Accept-Encoding": "identity"}
        http = openai.DefaultHttpxClient(headers=headers, event_hooks={"response": [self._limit]})
        self.client = openai.OpenAI(
            base_url=url, api_key=self.key, timeout=self.timeout, max_retries=0, http_client=http
        )
        self.pool = ThreadPoolExecutor(config.teacher_concurrency)
        self.answers: dict[tuple[tuple[int, ...], tuple[int, ...]], Future[list[_Row]]] = {}
        models = list(self._retry(lambda: self.client.models.list().data))
        self.model = config.teacher_model or models[0].id
        options = [x.model_extra or {} for x in models if x.id == self.model]
        if not options:
            names = ", ".join(x.id for x in models)
            raise TeacherError(f"teacher_model: expected one of {names}, got {self.model!r}")
        context = options[0].get("max_model_len") or sys.maxsize
        # A request generates one token, and a server does not tell the size of its vocabulary.
        self.limits = Limits(context - 1, ids=sys.maxsize)
        self._check_tokens(tokenizer)

    def _check_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise TeacherError unless the server knows the student's token ids and returns K each."""
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        of_text = self._retry(lambda: self._ask(_PROBE, 0))
        of_ids = self._retry(lambda: self._ask(ids, self.k))
        try:
            served_ids = [next(iter(row)) for row in _prompt_log_probs(of_text)[1:]]
            self._rows(of_ids, ids[:1], ids[1:])
        except _MALFORMED as error:
            problem = f"does not answer prompt_logprobs as vLLM does: {self._without_key(error)}"
            raise TeacherError(f"teacher: {self.url} {problem}") from None
        if served_ids != [str(token) for token in ids[1:]]:
            raise TeacherError(
                f"teacher: expected the student's tokenizer, but {self.url} has other ids for "
                f"{_PROBE!r}; serve a model of the student's family"
            )

    def prepare(self, completions: list[Completion]) -> None:
        """Request all completions of a step at once, except those of the step before."""
        previous, self.answers = self.answers, {}
        for c in completions:
            key = _key(c)
            self.answers[key] = previous.get(key) or self.pool.submit(self._score, *key)

    def logits(self, completions: list[Completion], temperature: float) -> SparseLogits:
        """See Teacher: the top-K of every position and the token itself, at temperature 1."""
        assert temperature == 1
        try:
            rows = [row for c in completions for row in self.answers[_key(c)].result()]
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        ids, log_probs = torch.tensor(rows, dtype=torch.float64).unbind(-1)  # each [N, K + 1]
        log_probs, ids = log_probs.float().to(self.device), ids.long().to(self.device)
        return SparseLogits.from_log_probs(log_probs, ids, vocab_size=self.vocab_size)

    def _score(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[_Row]:
        ids = [*prompt, *completion]
        return self._retry(lambda: self._rows(self._ask(ids, self.k), prompt, completion))

    def _ask(self, prompt: list[int] | str, k: int) -> Any:
        body = {"prompt_logprobs": k, "add_special_tokens": False}
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=1, extra_body=body
        )

    def _limit(self, response: httpx2.Response) -> None:
        """Read the body of a response, limited in bytes and seconds."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise httpx2.DecodingError("expected an answer without compression")
        prompt = json.loads(response.request.content or "{}").get("prompt", "")
        size = _MAX_ANSWER_BYTES + _MAX_LOG_PROB_BYTES * (self.k + 2) * len(prompt)
        body, end = bytearray(), time.monotonic() + self.timeout
        assert isinstance(response.stream, httpx2.SyncByteStream)
        for part in response.stream:
            body += part
            if len(body) > size:
                raise httpx2.ReadError("the answer is larger than a valid one can be")
            if time.monotonic() > end:
                raise httpx2.ReadTimeout(f"the answer takes longer than {self.timeout} s")
        response.stream.close()
        response.stream = httpx2.ByteStream(bytes(body))

    def _rows(self, answer: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[_Row]:
        """Return the top-K of each position and its own token, filled up to K + 1 by id -1.

        Raise ValueError for other content.
        """
        rows = _prompt_log_probs(answer)[len(prompt) :]
        if len(rows) != len(completion):
            raise ValueError(f"prompt_logprobs of {len(rows)} tokens for {len(completion)}")
        return [self._row(x, token) for x, token in zip(rows, completion, strict=True)]

    def _row(self, raw: dict[str, Any], token: int) -> _Row:
        log_probs = {int(i): float(x["logprob"]) for i, x in raw.items()}
        row = sorted(log_probs.items(), key=lambda pair: (-pair[1], pair[0]))
        if token not in log_probs or not self.k <= len(row) <= self.k + 1:
            raise ValueError(f"expected {self.k} log-probs and the token's own, got {len(row)}")
        if not all(i >= 0 and x <= 1e-3 for i, x in row):
            raise ValueError("expected ids from 0 and log-probs up to 0")
        other = [i for i, x in row if i >= self.vocab_size and x > _PADDING_LOG_PROB]
        if other:
            raise TeacherError(
                f"teacher: expected ids below {self.vocab_size}, the rows of the student's "
                f"weights, but {self.url} gives id {other[0]} a probability of "
                f"{math.exp(log_probs[other[0]]):.2g}; serve a model of the student's family"
            )
        mass = torch.tensor([x for _, x in row]).exp().sum()
        if not mass < 1.01:
            raise ValueError(f"expected probabilities with a sum of at most 1, got {mass:.3f}")
        return row + [(-1, -math.inf)] * (self.k + 1 - len(row))

    def _retry(self, request: Callable[[], T]) -> T:
        """Return request(); retry transient failures until the patience or the program ends."""
        end, wait = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return request()
            except openai.AuthenticationError:
                reason = f"expected a valid key in the environment variable {self.key_name}"
                raise TeacherError(f"teacher: {self.url} refused the API key; {reason}") from None
            except openai.NotFoundError:
                reason = "expected http(s)://HOST/v1 of an OpenAI-compatible server"
                raise TeacherError(f"teacher: {self.url} has no such page; {reason}") from None
            except (openai.APIError, *_MALFORMED) as error:
                reason, status = self._without_key(error), getattr(error, "status_code", 500)
                if status < 500 and status not in _TRANSIENT_STATUS:
                    raise TeacherError(
                        f"teacher: {self.url} refused the request: {reason}; if it limits "
                        f"log-probs below k: {self.k}, start it with a higher --max-logprobs"
                    ) from None
                if time.monotonic() > end or not threading.main_thread().is_alive():
                    raise TeacherError(
                        f"teacher: no good answer from {self.url} for {self.patience} s "
                        f"(teacher_patience); the last one: {reason}"
                    ) from None
                if not self.has_warned:
                    self.has_warned = True
                    warnings.warn(f"teacher: {self.url} is asked again: {reason}", stacklevel=2)
            time.sleep(wait * random.uniform(0.5, 1))  # spreads the requests of several threads
            wait = min(2 * wait, 10.0)

    def _without_key(self, error: Exception) -> str:
        """Return the error's text without the API key."""
        causes = f" ({error.__cause__})" if error.__cause__ else ""
        return f"{type(error).__name__}: {error}{causes}".replace(self.key, "***")[:300]


def _key(completion: Completion) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(completion.prompt.teacher_ids), tuple(completion.ids)


def _prompt_log_probs(answer: Any) -> list[dict[str, Any]]:
    """Return the log-probs by position; the first position has none."""
    return (answer.choices[0].model_extra or {}).get("prompt_logprobs") or []

"""Chat templates: the token ids of a prompt, and of the answer that a template writes after it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import chat_template_utils

from opd_trainer.config.messages import Message, Messages
from opd_trainer.errors import convert_errors

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of transformers for the same
_PROBE = "one probing answer"


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer; without one, prompts are plain text."""

    tokenizer: Tokenizer
    variables: dict[str, Any] = field(default_factory=dict)
    date: str | None = None  # of templates that write one; default today
    eos_ids: frozenset[int] = frozenset()  # ids at which the model stops by itself
    key: str = "chat_template_kwargs"  # of the recipe, for error messages

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: those of the model, and the one that the template writes."""
        eos_ids = self.eos_ids | {self.tokenizer.eos_token_id}
        added = self.tokenizer.added_tokens_decoder.keys() | set(self.tokenizer.all_special_ids)
        after = self._encode(self._probed[1])
        ends = [x for x in after if x in eos_ids] or [x for x in after if x in added]
        return frozenset(eos_ids | set(ends[:1]))

    @cached_property
    def _probed(self) -> tuple[bool, str]:
        """Whether the template takes contents as parts alone, and what it writes after an answer,
        "" if that cannot be found out.
        """
        for as_parts in (False, True) if self.exists else ():
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            with suppress(ValueError):  # the template may expect other messages
                text = self._render(messages, {}, as_parts)
                if _PROBE in text:
                    return as_parts, text.rpartition(_PROBE)[2]
        return False, ""

    def prompt_ids(self, prompt: str | Messages, variables: dict[str, Any]) -> list[int]:
        """Return the token ids of a prompt, up to where the answer begins.

        A last message of the assistant is the beginning of the answer.
        """
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self._encode(self._render_prompt(prompt, variables))

    def answer_ids(
        self, prompt: str | Messages, answer: Message, variables: dict[str, Any]
    ) -> list[int]:
        """Return the token ids that follow the prompt's, up to and including an end id.

        They are what the template writes, such as an empty block of thoughts before the answer.
        """
        content = answer["content"]
        if written := self.end_ids & set(self._encode(content)):
            token = self.tokenizer.convert_ids_to_tokens(min(written))
            raise ValueError(f"completion: expected no {token!r}, which ends a completion")
        if isinstance(prompt, str):
            return [*self._encode(content), self.tokenizer.eos_token_id]
        start = self._render_prompt(prompt, variables)
        if prompt[-1]["role"] == "assistant":
            prompt, begun = prompt[:-1], prompt[-1]
            answer = begun | answer | {"content": begun["content"] + content}
        text = self._render([*prompt, answer], variables)
        if answer.get("reasoning_content", "").strip() not in text:
            raise ValueError("completion: the chat template leaves its reasoning_content out")
        if not text.startswith(start):
            same = next(i for i in range(len(start)) if text[i : i + 1] != start[i])
            raise ValueError(
                "completion: expected a chat template that begins a conversation with its prompt, "
                f"but the prompt ends with {start[same:][-40:]!r} where the conversation goes on "
                f"with {text[same:][:40]!r}; set other {self.key}, or another chat_template"
            )
        ids, known = self._encode(text), self._encode(start)
        # Where a token would span the end of the prompt, the rest is encoded alone.
        is_prefix = ids[: len(known)] == known
        ids = ids[len(known) :] if is_prefix else self._encode(text[len(start) :])
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        if ends:
            return ids[: ends[0] + 1]
        text = text[len(start) :].removesuffix(self._probed[1])
        return [*self._encode(text), self.tokenizer.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render_prompt(self, messages: Messages, variables: dict[str, Any]) -> str:
        is_begun = messages[-1]["role"] == "assistant"
        if is_begun and "tool_calls" in messages[-1]:
            raise ValueError(
                "prompt: expected a last message to answer or to continue, got tool calls of the "
                "assistant; add the tool's message"
            )
        mode = "continue_final_message" if is_begun else "add_generation_prompt"
        return self._render(messages, {mode: True} | variables)

    def _render(
        self, messages: list[Any], variables: dict[str, Any], as_parts: bool | None = None
    ) -> str:
        if self._probed[0] if as_parts is None else as_parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        variables = self.variables | variables
        expected = f"prompt: expected messages for the chat template, with {self.key}"
        with convert_errors(expected), _fixed_date(self.date):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **variables)
            self._check_support(messages, variables)
        return text

    def _check_support(self, messages: list[Any], variables: dict[str, Any]) -> None:
        """Raise ValueError for what the template would leave out without a word."""
        source = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        given = {key for message in messages for key in message}
        given |= {"tools"} if variables.get("tools") else set()
        for key, names in (
            ("tools", ("tools",)),
            ("tool_calls", ("tool_calls",)),
            ("reasoning_content", _REASONING),
        ):
            if key in given and not any(name in source for name in names):
                raise ValueError(f"it has no place for {key}; leave them out of the row")


@contextmanager
def _fixed_date(date: str | None) -> Iterator[None]:
    """Fix the date that `strftime_now` gives to templates; transformers takes no such variable."""
    if date is None:
        yield
        return
    moment = datetime.fromisoformat(date)
    with patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: moment)):
        yield

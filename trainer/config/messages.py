"""Messages of a conversation, in OpenAI's format or ShareGPT's."""

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, with_config
from typing_extensions import NotRequired, TypedDict  # pydantic needs these below Python 3.12

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_ALIASES = {
    "from": "role",
    "value": "content",
    "thinking": "reasoning_content",
    "reasoning": "reasoning_content",
}


@with_config(ConfigDict(extra="forbid"))
class Message(TypedDict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


def plain_message(message: Any) -> Any:
    """Return a message with the keys and roles of `Message`, and a text as its content.

    Null entries are dropped: a table has them for keys that only other rows use.
    """
    if not isinstance(message, dict):
        return message
    plain = {_ALIASES.get(key, key): x for key, x in _without_nulls(message).items()}
    if isinstance(role := plain.get("role"), str):
        plain["role"] = _ROLES.get(role, role)
    if isinstance(content := plain.get("content"), list):
        plain["content"] = "".join(map(_text, content))
    calls = plain.pop("tool_calls", None)
    if calls:  # a table has an empty list in other messages, which some templates refuse
        plain["tool_calls"] = [_with_parsed_arguments(x) for x in calls]
        plain.setdefault("content", "")
    return plain


Messages = list[Annotated[Message, BeforeValidator(plain_message)]]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(x) for k, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _text(part: Any) -> str:
    """Return the text of a content part."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"content: expected a text or parts {{type: text, text: ...}}, got {kind}")
    return part["text"]


def _with_parsed_arguments(call: Any) -> Any:
    """Return a tool call with its arguments as a mapping: templates encode a text once more."""
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return call | {"function": _with_parsed_arguments(call["function"])}
    with suppress(KeyError, TypeError, ValueError):
        if isinstance(arguments := json.loads(call["arguments"]), dict):
            return call | {"arguments": arguments}
    return call

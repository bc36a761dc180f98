"""Columns: a row of data, in any of the usual conventions, as a prompt and its completion."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from opd_trainer.config.messages import Messages, plain_message

_CONVERSATIONS = ("messages", "conversations")


def _parsed(value: Any) -> Any:
    """Parse a text as JSON: tables often hold nested values so."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {error}") from None


class Row(BaseModel):
    """The columns of a row of data; a scorer sees the other columns too.

    Messages have the keys `role` and `content`, or `from` and `value` as in ShareGPT; a content is
    a text or a list of parts `{type: text, text: ...}`, and an assistant's message may have
    `tool_calls` and `reasoning_content`. `messages` or `conversations` can stand for `prompt` and
    `completion`: a last message of the assistant is the completion. The recipe's `columns` names
    columns that are called otherwise.
    """

    # A text is a message of the user. The student continues a last message of the assistant.
    prompt: Annotated[str, Field(min_length=1)] | Annotated[Messages, Field(min_length=1)]
    # To learn from in SFT and by sft_coef: a text, or a list with one message of the assistant.
    completion: str | Messages | None = None
    privileged_context: str | Messages | None = None  # replaces the recipe's
    teacher: str | None = None  # name of its teacher, if the recipe has several
    # Functions that the assistant may call, as JSON schemas for the chat template.
    tools: list[dict[str, Any]] | None = None
    # Further variables of the chat templates, beside the recipe's.
    chat_template_kwargs: dict[str, Any] | None = None

    _parse = field_validator("tools", "chat_template_kwargs", mode="before")(_parsed)

    @field_validator("completion")
    @classmethod
    def _is_one_answer(cls, completion: str | Messages | None) -> str | Messages | None:
        if isinstance(completion, list) and [m["role"] for m in completion] != ["assistant"]:
            raise ValueError("expected one message of the assistant; move earlier ones to prompt")
        return completion


def parse_row(raw: Any, columns: dict[str, str]) -> tuple[Row, dict[str, Any]]:
    """Return the row, and all of its columns under the names that scorers and templates use.

    Args:
        raw: the row as it was read.
        columns: the row's column by the name that it has here.

    Raises:
        ValueError: a column is missing or does not fit.
    """
    if not isinstance(raw, dict):
        return Row.model_validate(raw), {}
    named = dict(raw)
    for name, column in columns.items():
        if column not in raw and name == "completion":
            continue  # held-out rows need none
        if column not in raw:
            raise ValueError(
                f"columns: expected a column {column!r} for {name}, got {', '.join(raw)}"
            )
        named[name] = raw[column]
    return Row.model_validate(_with_prompt(named, columns)), named


def _with_prompt(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row with the prompt and completion of its conversation, if it has only that."""
    found = [x for x in _CONVERSATIONS if row.get(x) is not None]
    mapped = [x for x in found if x in columns]
    if not found or (row.get("prompt") is not None and not mapped):
        return row
    column = (mapped or found)[0]
    try:
        messages = _parsed(row[column])
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None
    if not isinstance(messages, list):  # Row refuses it
        return row | {"prompt": messages}
    messages = [plain_message(x) for x in messages]
    roles = [x.get("role") if isinstance(x, dict) else None for x in messages]
    system = row.get("system")  # a column of many ShareGPT files
    if isinstance(system, str) and system and "system" not in roles[:1]:
        messages = [{"role": "system", "content": system}, *messages]
    if row.get("completion") is not None or len(roles) < 2 or roles[-1] != "assistant":
        return row | {"prompt": messages}
    return row | {"prompt": messages[:-1], "completion": messages[-1:]}

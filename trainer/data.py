"""Prompts: from files to the token ids that student and teacher see."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from trainer.config import DistillationConfig, Messages


@dataclass(frozen=True)
class Prompt:
    """One prompt as both models see it; the completion that follows is the same for both."""

    text: str
    student_ids: list[int]
    teacher_ids: list[int]


def load_prompts(
    source: str, config: DistillationConfig, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> list[Prompt]:
    """Read, check and tokenise every prompt of a source.

    Raises:
        ValueError: a malformed line, a missing column, an unfit value, or a prompt that leaves no
            room for its completion; the message names the source and the row.
    """
    prompts = []
    for number, row in enumerate(load_rows(source), start=1):
        where = f"{source}, row {number}"
        prompt, context = row.get("prompt"), row.get("privileged_context")
        if prompt is None:
            raise ValueError(f"{where}: missing column 'prompt', got columns {sorted(row)}")
        context = config.privileged_context if context is None else context
        if config.teacher == "self" and not context:
            raise ValueError(
                f"privileged_context: {where} has none, and a self-teacher without one is the student; "
                "set it in the recipe, or add the column"
            )
        ours = _encode(prompt, None, tokenizer, config.chat_template_kwargs, where)
        theirs = _encode(prompt, context, tokenizer, config.chat_template_kwargs, where)
        longest = max(len(ours), len(theirs)) + config.max_completion_length
        if longest > context_length:
            raise ValueError(
                f"{where}: with max_completion_length {config.max_completion_length} it takes {longest} "
                f"tokens, but the context holds {context_length}; shorten the prompt or the completion"
            )
        prompts.append(
            Prompt(prompt if isinstance(prompt, str) else prompt[-1]["content"], ours, theirs)
        )
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, got none")
    return prompts


def load_rows(source: str) -> Dataset | list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of the train split of a dataset on the hub."""
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise ValueError(f"{source}: no such file")
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=source, split="train")
    if path.suffix != ".jsonl":
        return load_dataset(source, split="train")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line:.80}")
        rows.append(row)
    return rows


def _encode(
    prompt: str | Messages,
    context: str | Messages | None,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    where: str,
) -> list[int]:
    """Token ids of the prompt behind its context.

    With a chat template a string prompt is a user message, a string context a system message; without
    one both are plain text, joined by a blank line.
    """
    if tokenizer.chat_template is not None:
        messages = _messages(prompt, "user", where)
        if context:
            messages = _messages(context, "system", where) + messages
        if [m["role"] for m in messages[:2]] == ["system", "system"]:  # many templates refuse two
            both = "\n\n".join(m["content"] for m in messages[:2])
            messages = [{"role": "system", "content": both}, *messages[2:]]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **template_kwargs
        )
    if not isinstance(prompt, str) or not isinstance(context, str | None):
        raise ValueError(f"{where}: messages need a chat template, which this tokenizer lacks")
    return tokenizer(f"{context}\n\n{prompt}" if context else prompt)["input_ids"]


def _messages(value: str | Messages, role: str, where: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    keys = {"role", "content"}
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and keys <= m.keys() for m in value
    ):
        raise ValueError(f"{where}: expected a string or role/content messages, got {value!r:.80}")
    return value

"""Prompts: from files to the token ids that student and teacher see."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedTokenizerBase

from trainer.config import DistillationConfig, Messages


class Row(BaseModel):
    """What a row of the data must hold; other columns are ignored."""

    prompt: str | Messages
    privileged_context: str | Messages | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt as both models see it; the completion that follows is the same for both."""

    text: str
    student_ids: list[int]
    teacher_ids: list[int]


def load_prompts(
    source: str, config: DistillationConfig, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> list[Prompt]:
    """Read, check and tokenise every prompt; an error names the source and the row."""
    prompts = []
    for number, raw in enumerate(load_rows(source), start=1):
        where = f"{source}, row {number}"
        try:
            prompts.append(_prompt(Row.model_validate(raw), config, tokenizer, context_length))
        except ValidationError as error:
            column, reason = [*error.errors()[0]["loc"], "row"][0], error.errors()[0]["msg"]
            raise ValueError(f"{where}, {column}: {reason.lower()}, got {raw!r:.80}") from None
        except ValueError as error:
            raise ValueError(f"{where}, {error}") from None
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, got none")
    return prompts


def _prompt(
    row: Row, config: DistillationConfig, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> Prompt:
    context = row.privileged_context or config.privileged_context
    if config.teacher == "self" and not context:
        raise ValueError("privileged_context: missing; a self-teacher without it is the student")
    ours = _encode(row.prompt, None, tokenizer, config.chat_template_kwargs)
    theirs = _encode(row.prompt, context, tokenizer, config.chat_template_kwargs)
    longest = max(len(ours), len(theirs)) + config.max_completion_length
    if longest > context_length:
        raise ValueError(
            f"prompt: with max_completion_length {config.max_completion_length} it takes {longest} "
            f"tokens, but the context holds {context_length}; shorten one of them"
        )
    text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1].get("content", "")
    return Prompt(text, ours, theirs)


def load_rows(source: str) -> Dataset | list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of the train split of a dataset on the hub."""
    path, rows = Path(source), []
    if path.suffix not in (".jsonl", ".parquet"):
        return load_dataset(source, split="train")
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=source, split="train")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg}") from None
    return rows


def _encode(
    prompt: str | Messages,
    context: str | Messages | None,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
) -> list[int]:
    """Token ids of the prompt behind its context; plain text without a chat template."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str) or not isinstance(context, str | None):
            raise ValueError("prompt: messages need a chat template, which the tokenizer lacks")
        return tokenizer(f"{context}\n\n{prompt}" if context else prompt)["input_ids"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(context, str):
        context = [{"role": "system", "content": context}]
    messages = [*(context or []), *prompt]
    if [m["role"] for m in messages[:2]] == ["system", "system"]:  # many templates refuse two
        both = "\n\n".join(m["content"] for m in messages[:2])
        messages = [{"role": "system", "content": both}, *messages[2:]]
    options = {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(messages, **options, **template_kwargs)

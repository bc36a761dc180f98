"""Prompts: from files to the token ids that student and teacher see."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from pydantic import BaseModel, ValidationError

from trainer.config import DistillationConfig, Messages
from trainer.models import Tokenizer


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


@dataclass(frozen=True)
class PromptReader:
    """Reads, checks and tokenises prompts; an error names the source and the row."""

    config: DistillationConfig
    tokenizer: Tokenizer
    contexts: tuple[int, int]  # tokens that student and teacher can hold

    def read(self, source: str) -> list[Prompt]:
        """Every prompt of a source, see `load_rows`."""
        prompts = []
        for number, raw in enumerate(load_rows(source), start=1):
            try:
                prompts.append(self._prompt(Row.model_validate(raw)))
            except ValidationError as error:
                column, reason = [*error.errors()[0]["loc"], "row"][0], error.errors()[0]["msg"]
                reason = f"row {number}, {column}: {reason.lower()}, got {raw!r:.80}"
                raise ValueError(f"{source}, {reason}") from None
            except (ValueError, TemplateError) as error:
                raise ValueError(f"{source}, row {number}, {error}") from None
        if not prompts:
            raise ValueError(f"{source}: expected at least one prompt, got none")
        return prompts

    def _prompt(self, row: Row) -> Prompt:
        privileged = row.privileged_context or self.config.privileged_context
        if self.config.teacher == "self" and not privileged:
            raise ValueError(
                "privileged_context: missing; without it a self-teacher is the student"
            )
        ours, theirs = self._encode(row.prompt, None), self._encode(row.prompt, privileged)
        for ids, context in zip((ours, theirs), self.contexts, strict=True):
            room = context - self.config.max_completion_length
            if not 0 < len(ids) <= room:
                reason = f"the context of {context} without max_completion_length"
                raise ValueError(f"prompt: expected 1 to {room} tokens, {reason}, got {len(ids)}")
        text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        return Prompt(text, ours, theirs)

    def _encode(self, prompt: str | Messages, context: str | Messages | None) -> list[int]:
        """Token ids of the prompt behind its context; plain text without a chat template."""
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str) or not isinstance(context, str | None):
                raise ValueError("prompt: messages need a chat template, which the tokenizer lacks")
            return self.tokenizer(f"{context}\n\n{prompt}" if context else prompt)["input_ids"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(context, str):
            context = [{"role": "system", "content": context}]
        messages = [*(context or []), *prompt]
        if [m["role"] for m in messages[:2]] == ["system", "system"]:  # many templates refuse two
            both = "\n\n".join(m["content"] for m in messages[:2])
            messages = [{"role": "system", "content": both}, *messages[2:]]
        options = {"add_generation_prompt": True, "return_dict": False}
        options |= self.config.chat_template_kwargs
        return self.tokenizer.apply_chat_template(messages, **options)


def load_rows(source: str) -> Dataset | list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of the train split of a dataset on the hub."""
    path, rows = Path(source), []
    if path.suffix not in (".jsonl", ".parquet"):
        return load_dataset(source, split="train")
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=source, split="train")
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip().split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg}") from None
    return rows

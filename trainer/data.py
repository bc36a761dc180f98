"""Prompts: from files to the token ids that student and teacher see."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from datasets import Dataset, load_dataset
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedTokenizerBase as Tokenizer

from trainer.config import EvaluationConfig, StageConfig, TeacherConfig
from trainer.config.values import Message, Messages, reason
from trainer.errors import explained

_UNREADABLE = "{}: expected a .jsonl or .parquet file, a dataset of the hub or reasoning_gym:TASK"


class Row(BaseModel):
    """What a row of the data may hold; a scorer sees the other columns too."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[Messages, Field(min_length=1)]
    privileged_context: str | Messages | None = None  # instead of the recipe's
    teacher: str | None = None  # which of the recipe's, where there are several
    completion: str | None = None  # to learn from in SFT and by sft_coef


@dataclass(frozen=True)
class Prompt:
    """One prompt as both models see it; the completion that follows is the same for both."""

    text: str
    student_ids: list[int]
    teacher_ids: list[int]
    teacher: str = ""  # the name of its teacher, "" if there is only one
    reference_ids: list[int] | None = None  # the row's own completion, EOS included
    row: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Limits:
    """The inputs that a model can take."""

    context: int  # tokens of a sequence
    ids: int  # those below have an embedding and a logit


@dataclass(frozen=True)
class PromptReader:
    """Reads, checks and tokenises prompts; an error names the source and the row."""

    config: StageConfig
    tokenizer: Tokenizer
    limits: Limits  # of the student
    teacher_limits: dict[str, Limits]  # of each teacher, by its name

    def read(self, source: str) -> list[Prompt]:
        """Every prompt of a source, see `load_rows`."""
        prompts = []
        for number, raw in enumerate(load_rows(source), start=1):
            try:
                prompts.append(self._prompt(Row.model_validate(raw), raw))
            except ValidationError as error:
                column = [*error.errors()[0]["loc"], "row"][0]
                wrong = f"row {number}, {column}: {reason(error)}, got {raw!r:.80}"
                raise ValueError(f"{source}, {wrong}") from None
            except ValueError as error:
                raise ValueError(f"{source}, row {number}, {error}") from None
        if not prompts:
            raise ValueError(f"{source}: expected at least one prompt, got none")
        return prompts

    def _prompt(self, row: Row, raw: dict[str, Any]) -> Prompt:
        privileged = row.privileged_context
        if isinstance(self.config, TeacherConfig):
            privileged = privileged or _filled(self.config.privileged_context, raw)
            if self.config.teacher == "self" and not privileged:
                raise ValueError(
                    "privileged_context: missing; without it a self-teacher is the student"
                )
        ours, theirs = self._encode(row.prompt, None), self._encode(row.prompt, privileged)
        name, teachers = row.teacher or "", self.teacher_limits
        if "" in teachers or not teachers:  # a single teacher has every row
            name = ""
        elif name not in teachers:
            raise ValueError(f"teacher: expected one of {', '.join(teachers)}, got {row.teacher!r}")
        length = self.config.max_completion_length
        models = [("the student", ours, self.limits, length)]
        if teachers:
            probes = isinstance(self.config, EvaluationConfig) and self.config.prefix_probe
            models += [("the teacher", theirs, teachers[name], length * (1 + probes))]
        for model, ids, limits, reserved in models:
            room = limits.context - reserved
            if not 0 < len(ids) <= room:
                why = f"{model}'s context of {limits.context} without max_completion_length"
                raise ValueError(f"prompt: expected 1 to {room} tokens, {why}, got {len(ids)}")
            column = "prompt" if max(ids) in ours else "privileged_context"
            self._check_ids(column, ids, model, limits)
        text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        reference = self._completion(row.completion) if self.config.uses_references else None
        return Prompt(text, ours, theirs, name, reference, raw)

    def _completion(self, text: str | None) -> list[int] | None:
        if text is None:
            return None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = self.config.max_completion_length - 1
        if len(ids) > most:
            raise ValueError(
                f"completion: expected at most {most} tokens, max_completion_length without EOS, "
                f"got {len(ids)}"
            )
        self._check_ids("completion", ids, "the student", self.limits)
        return [*ids, self.tokenizer.eos_token_id]

    def _check_ids(self, column: str, ids: list[int], model: str, limits: Limits) -> None:
        """Raise where a tokenizer has more tokens than the model has rows of weights."""
        if (largest := max(ids, default=0)) >= limits.ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{column}: expected token ids below {limits.ids}, the rows of {model}'s "
                f"weights, got {largest}, {token!r}; leave that token out or, if the chat "
                "template puts it there, save the model with resized embeddings first"
            )

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
        with explained("prompt: expected what the chat template takes, with chat_template_kwargs"):
            return self.tokenizer.apply_chat_template(messages, **options)


_template = cache(SandboxedEnvironment(undefined=StrictUndefined).from_string)


def _filled(context: str | Messages | None, row: dict[str, Any]) -> str | Messages | None:
    """The recipe's context as a Jinja template, whose {{ column }} is the row's."""
    with explained(f"privileged_context: expected a template of the columns {', '.join(row)}"):
        if context is None or isinstance(context, str):
            return context and _template(context).render(row)
        return [
            Message(role=m["role"], content=_template(m["content"]).render(row)) for m in context
        ]


def load_rows(source: str) -> Dataset | list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, of a dataset on the hub, NAME?split=test&name=main, or
    of reasoning_gym:TASK?OPTION=VALUE&... with the task's own options.
    """
    name, _, rest = source.partition("?")
    if source.endswith(".jsonl"):
        return _json_lines(Path(source))
    if name.startswith("reasoning_gym:"):
        import reasoning_gym
    with explained(_UNREADABLE.format(source)):
        pairs = [option.partition("=")[::2] for option in rest.split("&") if option]
        options = {key: yaml.safe_load(value) for key, value in pairs}
        if name.startswith("reasoning_gym:"):
            task = reasoning_gym.create_dataset(name.removeprefix("reasoning_gym:"), **options)
            return [{"prompt": entry["question"], **entry} for entry in task]
        if source.endswith(".parquet"):
            return load_dataset("parquet", data_files=source, split="train")
        return load_dataset(name, **{"split": "train"} | options)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), start=1):
        try:
            rows.append(json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: malformed JSON: {getattr(error, 'msg', error)}"
            ) from None
    return rows

"""Prompts: from rows of data to the token ids that student and teacher see."""

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

from opd_trainer.config.base import StageConfig, TeacherConfig
from opd_trainer.config.stages import DistillationConfig, EvaluationConfig, SFTConfig
from opd_trainer.config.values import Messages
from opd_trainer.errors import convert_errors
from opd_trainer.recipe import describe


class Row(BaseModel):
    """The columns of a row of data; a scorer sees the other columns too."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[Messages, Field(min_length=1)]
    privileged_context: str | Messages | None = None  # replaces the recipe's
    teacher: str | None = None  # name of its teacher, if the recipe has several
    completion: str | None = None  # to learn from in SFT and by sft_coef


@dataclass(frozen=True)
class Prompt:
    """A prompt as student and teacher see it; the same completion follows both."""

    text: str
    student_ids: list[int]
    teacher_ids: list[int]
    teacher: str = ""  # name of its teacher, "" for a single teacher
    reference_ids: list[int] | None = None  # the row's own completion, with EOS
    row: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Limits:
    """The inputs that a model can take."""

    context: int  # tokens of a sequence
    ids: int  # number of token ids that have an embedding and a logit


@dataclass(frozen=True)
class PromptReader:
    """Reads, validates and tokenises prompts; an error names the source and the row."""

    config: StageConfig
    tokenizer: Tokenizer
    limits: Limits  # of the student
    teacher_limits: dict[str, Limits]  # by the teacher's name

    def read(self, source: str) -> list[Prompt]:
        """Return all prompts of a source, see `load_rows`."""
        prompts = []
        for number, raw in enumerate(load_rows(source), start=1):
            try:
                prompts.append(self._prompt(Row.model_validate(raw), raw))
            except ValidationError as error:
                column = [*error.errors()[0]["loc"], "row"][0]
                wrong = f"row {number}, {column}: {describe(error)}, got {raw!r:.80}"
                raise ValueError(f"{source}, {wrong}") from None
            except ValueError as error:
                raise ValueError(f"{source}, row {number}, {error}") from None
        if not prompts:
            raise ValueError(f"{source}: expected at least one prompt, got none")
        return prompts

    def _prompt(self, row: Row, raw: dict[str, Any]) -> Prompt:
        privileged = row.privileged_context
        if isinstance(self.config, TeacherConfig):
            privileged = privileged or _rendered(self.config.privileged_context, raw)
            if self.config.teacher == "self" and not privileged:
                raise ValueError("privileged_context: missing; without it, self is the student")
        student_ids, teacher_ids = (self._encode(row.prompt, x) for x in (None, privileged))
        name, teachers = row.teacher or "", self.teacher_limits
        if "" in teachers or not teachers:  # a single teacher scores every row
            name = ""
        elif name not in teachers:
            raise ValueError(f"teacher: expected one of {', '.join(teachers)}, got {row.teacher!r}")
        length = self.config.max_completion_length
        models = [("the student", student_ids, self.limits, length)]
        if teachers:
            is_probe = isinstance(self.config, EvaluationConfig) and self.config.prefix_probe
            models += [("the teacher", teacher_ids, teachers[name], length * (1 + is_probe))]
        for model, ids, limits, reserved in models:
            room = limits.context - reserved
            if not 0 < len(ids) <= room:
                why = f"{model}'s context of {limits.context} minus max_completion_length"
                raise ValueError(f"prompt: expected 1 to {room} tokens, {why}, got {len(ids)}")
            column = "prompt" if max(ids) in student_ids else "privileged_context"
            self._check_ids(column, ids, model, limits)
        text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        reference = None if row.completion is None else self._reference(row.completion)
        return Prompt(text, student_ids, teacher_ids, name, reference, raw)

    def _reference(self, text: str) -> list[int] | None:
        """Return the token ids of the row's own completion, if the stage learns from them."""
        config = self.config
        is_mixed = isinstance(config, DistillationConfig) and config.sft_coef > 0
        if not is_mixed and not (isinstance(config, SFTConfig) and config.generate_from == "data"):
            return None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = self.config.max_completion_length - 1
        if len(ids) > most:
            raise ValueError(
                f"completion: expected at most {most} tokens, without EOS, got {len(ids)}"
            )
        self._check_ids("completion", ids, "the student", self.limits)
        return [*ids, self.tokenizer.eos_token_id]

    def _check_ids(self, column: str, ids: list[int], model: str, limits: Limits) -> None:
        """Raise ValueError if the tokenizer has a token that the model has no weights for."""
        if (largest := max(ids, default=0)) >= limits.ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{column}: expected token ids below {limits.ids}, the rows of {model}'s weights, "
                f"got {largest}, {token!r}; leave that token out, or resize the model's embeddings"
            )

    def _encode(self, prompt: str | Messages, context: str | Messages | None) -> list[int]:
        """Return the token ids of context and prompt, as plain text without a chat template."""
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
        expected = "prompt: expected messages for the chat template, with chat_template_kwargs"
        with convert_errors(expected):
            return self.tokenizer.apply_chat_template(messages, **options)


_template = cache(SandboxedEnvironment(undefined=StrictUndefined).from_string)


def _rendered(context: str | Messages | None, row: dict[str, Any]) -> str | Messages | None:
    """Return the recipe's context, a Jinja template, with the row's columns filled in."""
    with convert_errors(f"privileged_context: expected a template of the columns {', '.join(row)}"):
        if context is None or isinstance(context, str):
            return context and _template(context).render(row)
        return [m | {"content": _template(m["content"]).render(row)} for m in context]


def load_rows(source: str) -> Dataset | list[dict[str, Any]]:
    """Return the rows of a .jsonl or .parquet file, of a dataset on the hub,
    NAME?split=test&name=main, or of reasoning_gym:TASK?OPTION=VALUE&... with the task's options.
    """
    name, _, query = source.partition("?")
    if source.endswith(".jsonl"):
        return read_json_lines(Path(source))
    if name.startswith("reasoning_gym:"):
        import reasoning_gym
    expected = "expected a .jsonl or .parquet file, a dataset of the hub or reasoning_gym:TASK"
    with convert_errors(f"{source}: {expected}"):
        pairs = [option.partition("=")[::2] for option in query.split("&") if option]
        options = {key: yaml.safe_load(value) for key, value in pairs}
        if name.startswith("reasoning_gym:"):
            task = reasoning_gym.create_dataset(name.removeprefix("reasoning_gym:"), **options)
            return [{"prompt": entry["question"], **entry} for entry in task]
        if source.endswith(".parquet"):
            return load_dataset("parquet", data_files=source, split="train")
        return load_dataset(name, **{"split": "train"} | options)


def read_json_lines(path: Path, may_be_cut: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; if it may be cut, without a last line that has no end."""
    rows, content = [], path.read_bytes()
    if may_be_cut:
        content = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(content.rstrip().splitlines(), start=1):
        try:
            rows.append(json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{path}, line {number}: malformed JSON: {reason}") from None
    return rows

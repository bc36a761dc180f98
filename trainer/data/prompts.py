"""Prompts: the token ids that student and teacher see of a row."""

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd_trainer.command.recipe import describe
from opd_trainer.config.base import StageConfig, TeacherConfig
from opd_trainer.config.messages import Messages
from opd_trainer.config.stages import DistillationConfig, EvaluationConfig, SFTConfig
from opd_trainer.data.columns import Row, parse_row
from opd_trainer.data.sources import load_rows
from opd_trainer.data.templates import ChatTemplate
from opd_trainer.errors import convert_errors


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
    """The inputs that a model can take, and where it stops by itself."""

    context: int  # tokens of a sequence
    ids: int  # number of token ids that have an embedding and a logit
    eos_ids: frozenset[int] = frozenset()  # of its generation config


@dataclass(frozen=True)
class PromptReader:
    """Reads, validates and tokenises prompts; an error names the source and the row."""

    config: StageConfig
    tokenizer: Tokenizer
    limits: Limits  # of the student
    teacher_limits: dict[str, Limits]  # by the teacher's name
    # Those of teachers with a chat template of their own; the others read the student's.
    teacher_tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    def read(self, source: str, learns: bool = False) -> list[Prompt]:
        """Return all prompts of a source, see `load_rows`.

        Args:
            source: see `load_rows`.
            learns: whether the rows are for training, where a stage may need their completions.
        """
        drops = self.config.on_bad_row == "drop"
        prompts, wrong = [], []
        rows = load_rows(source, keep_errors=drops)
        for number, raw in enumerate(rows, start=1):
            try:
                prompts.append(self._read_row(raw, f"{source}, row {number}", learns))
            except ValueError as error:
                if not drops:
                    raise ValueError(f"{error}; on_bad_row: drop leaves such rows out") from None
                wrong.append(str(error))
        if not prompts:
            found = f"{len(wrong)} bad rows; the first: {wrong[0]}" if wrong else "none"
            raise ValueError(f"{source}: expected at least one prompt, got {found}")
        if wrong:
            dropped = f"data: dropped {len(wrong)} of {len(rows)} rows (on_bad_row: drop)"
            tell(self.config, f"{dropped}; the first: {wrong[0]}")
        return prompts

    def _read_row(self, raw: Any, place: str, learns: bool) -> Prompt:
        """Return the prompt of a row; raise ValueError that begins with its place."""
        if isinstance(raw, ValueError):  # of a line that is no JSON
            raise raw
        try:
            row, columns = parse_row(raw, self.config.columns)
            if learns and row.completion is None and (key := self._completion_key):
                raise ValueError(f"completion: missing; {key}: expected a completion in every row")
            return self._prompt(row, columns)
        except ValidationError as error:
            column = [*error.errors()[0]["loc"], "row"][0]
            problem = f"{column}: {describe(error)}, got {raw!r:.80}"
            if isinstance(raw, dict) and column == "prompt" and "prompt" not in raw:
                problem += "; set columns if it is called otherwise"
            raise ValueError(f"{place}, {problem}") from None
        except ValueError as error:
            raise ValueError(f"{place}, {error}") from None

    @cached_property
    def template(self) -> ChatTemplate:
        """The student's chat template."""
        config = self.config
        variables, date = config.chat_template_kwargs, config.chat_template_date
        return ChatTemplate(self.tokenizer, variables, date, self.limits.eos_ids)

    @cached_property
    def teacher_templates(self) -> dict[str, ChatTemplate]:
        """The chat templates that the teachers read, by name."""
        if not isinstance(self.config, TeacherConfig):
            return {}
        key, variables = "teacher_chat_template_kwargs", self.config.teacher_chat_template_kwargs
        if variables is None:
            key, variables = "chat_template_kwargs", self.config.chat_template_kwargs
        templates = {}
        for name, limits in self.teacher_limits.items():
            tokenizer = self.teacher_tokenizers.get(name, self.tokenizer)
            date = self.config.chat_template_date
            templates[name] = ChatTemplate(tokenizer, variables, date, limits.eos_ids, key)
        return templates

    @property
    def _completion_key(self) -> str | None:
        """The key that makes the stage learn from the rows' own completions, if it does."""
        config = self.config
        if isinstance(config, DistillationConfig) and config.sft_coef > 0:
            return "sft_coef"
        is_data = isinstance(config, SFTConfig) and config.generate_from == "data"
        return "generate_from" if is_data else None

    def _prompt(self, row: Row, columns: dict[str, Any]) -> Prompt:
        privileged = row.privileged_context
        if isinstance(self.config, TeacherConfig):
            privileged = privileged or _rendered(self.config.privileged_context, columns)
            if self.config.teacher == "self" and not privileged:
                self._check_same_teacher()
        name, teachers = row.teacher or "", self.teacher_limits
        if "" in teachers or not teachers:  # a single teacher scores every row
            name = ""
        elif name not in teachers:
            raise ValueError(f"teacher: expected one of {', '.join(teachers)}, got {row.teacher!r}")
        variables = {**(row.chat_template_kwargs or {})}
        if row.tools:
            variables["tools"] = row.tools
        template = self.template
        asked = _with_context(template, row.prompt, None)
        student_ids = template.prompt_ids(asked, variables)
        read = self.teacher_templates.get(name, template)
        teacher_ids = read.prompt_ids(_with_context(read, row.prompt, privileged), variables)
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
        reference = None
        if row.completion is not None and self._completion_key:
            reference = self._reference(asked, row.completion, variables)
        text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        return Prompt(text, student_ids, teacher_ids, name, reference, columns)

    def _reference(
        self, prompt: str | Messages, completion: str | Messages, variables: dict[str, Any]
    ) -> list[int]:
        """Return the token ids of the row's own completion after its prompt."""
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        ids = self.template.answer_ids(prompt, completion[0], variables)
        most = self.config.max_completion_length - 1
        if len(ids) > most + 1:
            raise ValueError(
                f"completion: expected at most {most} tokens, without EOS, got {len(ids) - 1}"
            )
        self._check_ids("completion", ids, "the student", self.limits)
        return ids

    def _check_same_teacher(self) -> None:
        """Raise ValueError if a teacher without privileged context is the student itself."""
        student, (teacher,) = self.template, self.teacher_templates.values()
        if teacher.variables == student.variables and teacher.tokenizer is student.tokenizer:
            raise ValueError("privileged_context: missing; without it, self is the student")

    def _check_ids(self, column: str, ids: list[int], model: str, limits: Limits) -> None:
        """Raise ValueError if the tokenizer has a token that the model has no weights for."""
        if (largest := max(ids, default=0)) >= limits.ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{column}: expected token ids below {limits.ids}, the rows of {model}'s weights, "
                f"got {largest}, {token!r}; leave that token out, or resize the model's embeddings"
            )


def tell(config: StageConfig, text: str) -> None:
    """Print a line or more for the user, on one rank."""
    if config.should_save:
        print(text)


def _with_context(
    template: ChatTemplate, prompt: str | Messages, context: str | Messages | None
) -> str | Messages:
    """Return context and prompt as messages, or as plain text without a chat template."""
    if not template.exists:
        if not isinstance(prompt, str) or not isinstance(context, str | None):
            raise ValueError(
                "prompt: messages need a chat template, which the tokenizer lacks; set "
                "chat_template"
            )
        return f"{context}\n\n{prompt}" if context else prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(context, str):
        context = [{"role": "system", "content": context}]
    messages = [*(context or []), *prompt]
    if [m["role"] for m in messages[:2]] == ["system", "system"]:  # many templates refuse two
        both = "\n\n".join(m["content"] for m in messages[:2])
        messages = [{"role": "system", "content": both}, *messages[2:]]
    return messages


_template = cache(SandboxedEnvironment(undefined=StrictUndefined).from_string)


def _rendered(context: str | Messages | None, row: dict[str, Any]) -> str | Messages | None:
    """Return the recipe's context, a Jinja template, with the row's columns filled in."""
    with convert_errors(f"privileged_context: expected a template of the columns {', '.join(row)}"):
        if context is None or isinstance(context, str):
            return context and _template(context).render(row)
        return [m | {"content": _template(m["content"]).render(row)} for m in context]

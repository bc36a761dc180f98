"""Prompts: from rows of data to the token ids that student and teacher see."""

from opd_trainer.data.prompts import Limits, Prompt, PromptReader, tell
from opd_trainer.data.sources import load_rows, read_json_lines
from opd_trainer.data.templates import ChatTemplate

__all__ = [
    "ChatTemplate",
    "Limits",
    "Prompt",
    "PromptReader",
    "load_rows",
    "read_json_lines",
    "tell",
]

"""Tokenizers with more tokens than their model has rows of weights, such as Gemma 3 1B's: a token
without weights ends the command with one line before training.
"""

import json
import re

import pytest
from transformers import AutoTokenizer

from opd_trainer.__main__ import main
from tests.tiny_run import error_line, write_model, write_recipe


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a valid recipe."""
    write_recipe(tmp_path)
    return tmp_path


def _with_a_97th_token(model, **special):
    """Add a token of id 97 to the tokenizer of a model with 97 embeddings, ids 0 to 96."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens(special)
    assert tokenizer.convert_tokens_to_ids("<image>") == 97
    tokenizer.save_pretrained(model)
    return model


def _rows(folder, **row):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"} | row))
    return path


def _arguments(folder, **changes):
    options = {"model": folder / "model", "output_dir": folder / "run"} | changes
    return folder / "recipe.yaml", *[x for k, v in options.items() for x in (f"--{k}", v)]


@pytest.mark.parametrize("column", ["prompt", "completion", "privileged_context"])
def test_a_token_without_an_embedding(folder, capsys, column):
    _with_a_97th_token(folder / "model")
    rows = _rows(folder, **{column: "see <image>"})
    line = error_line(capsys, "distill", *_arguments(folder, train_data=rows, sft_coef=1))
    model = "teacher" if column == "privileged_context" else "student"
    expected = f"rows.jsonl, row 1, {column}: expected token ids below 97, the rows of the {model}'"
    assert re.search(f"{expected}s weights, got 97, '<image>'; leave that token out", line)


def test_a_token_of_which_one_teacher_has_no_embedding(folder, capsys):
    """The limits of a row are those of its own teacher."""
    _with_a_97th_token(folder / "model")
    small, large = (
        _with_a_97th_token(write_model(folder / str(size), vocab_size=size)) for size in (97, 98)
    )
    teacher = json.dumps({"s": str(small), "l": str(large)})
    for name in "ls":
        rows = _rows(folder, teacher=name, privileged_context="see <image>")
        changes = {"train_data": rows, "eval_data": rows, "teacher": teacher, "max_steps": 1}
        arguments = _arguments(folder, **changes, output_dir=folder / name)
        if name == "s":
            line = error_line(capsys, "distill", *arguments)
            assert re.search("privileged_context: .* below 97, the rows of the teacher's", line)
        else:
            main(["distill", *map(str, arguments)])


def test_eos_without_an_embedding(folder, capsys):
    _with_a_97th_token(folder / "model", eos_token="<image>")
    line = error_line(capsys, "distill", *_arguments(folder))
    assert re.search("model: expected an EOS token with an id below 97, .*'<image>' of id", line)


def test_padding_without_an_embedding_is_replaced(folder):
    _with_a_97th_token(folder / "model", pad_token="<image>")
    main(["distill", *map(str, _arguments(folder, max_steps=1))])
    assert AutoTokenizer.from_pretrained(folder / "run" / "model").pad_token == "</s>"

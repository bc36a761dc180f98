"""Prompts: what student and teacher see, and the error message of every mistake in the data."""

import json

import pandas
import pytest

from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.data import Limits, PromptReader, load_rows
from opd_trainer.models.load import (
    check_vocabularies,
    compare_tokenizers,
    load_model,
    load_tokenizer,
)
from tests.tiny_run import CHARACTERS, error_line, tiny_tokenizer, write_model, write_recipe


@pytest.fixture
def load(tmp_path):
    """Return a function that reads rows by a recipe with changes."""

    def load(rows, chat=True, context_length=256, suffix="jsonl", **changes):
        config = load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
        source = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            pandas.DataFrame(rows).to_parquet(source)
        elif isinstance(rows, str):
            source.write_text(rows)
        else:
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = tiny_tokenizer(chat)
        limits = Limits(context_length, ids=97)
        prompts = PromptReader(config, tokenizer, limits, {"": limits}).read(str(source))
        decode = tokenizer.decode
        return [(decode(p.student_ids), decode(p.teacher_ids)) for p in prompts]

    return load


USER = [{"role": "user", "content": "hi"}]
SYSTEM = [{"role": "system", "content": "old"}]
TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("prompt", "context", "student", "teacher"),
    [
        ("hi", "be brief", "u:hi/a:", "s:be brief/u:hi/a:"),
        (USER, "be brief", "u:hi/a:", "s:be brief/u:hi/a:"),
        ("hi", TURNS, "u:hi/a:", "u:x/a:y/u:hi/a:"),
        (SYSTEM + USER, "new", "s:old/u:hi/a:", "s:new\n\nold/u:hi/a:"),
        (SYSTEM + USER, TURNS, "s:old/u:hi/a:", "u:x/a:y/s:old/u:hi/a:"),
    ],
)
def test_the_teacher_alone_sees_the_privileged_context(load, prompt, context, student, teacher):
    rows = [{"prompt": prompt}, {"prompt": prompt, "privileged_context": "own"}]
    first, second = load(rows, privileged_context=context)
    assert tuple(text.replace(" ", "") for text in first) == (
        student.replace(" ", ""),
        teacher.replace(" ", ""),
    )
    assert second[0].replace(" ", "") == student.replace(" ", "")
    assert "own" in second[1].replace(" ", "")


@pytest.mark.parametrize(
    ("context", "teacher"),
    [
        ("it is {{ answer }}", "s:it is 4/u:2+2/a:"),
        ([{"role": "user", "content": "{{ answer }} {{ why.short }}"}], "u:4 {{ x/u:2+2/a:"),
    ],
)
def test_the_recipes_context_is_a_template_of_the_rows_columns(load, context, teacher):
    """It is rendered once: the content of a column is text, even if it looks like a template."""
    row = {"prompt": "2+2", "answer": 4, "why": {"short": "{{ x"}}
    own = {"prompt": "2+2", "privileged_context": "{{ answer"}
    first, second = load([row, own], privileged_context=context)
    assert [text.replace(" ", "") for text in first] == ["u:2+2/a:", teacher.replace(" ", "")]
    assert second[1].replace(" ", "") == "s:{{answer/u:2+2/a:"


@pytest.mark.parametrize("context", ["{{ anwser }}", "{{ answer", "{{ answer.__class__ }}"])
def test_a_template_that_does_not_fit_names_the_columns(load, context):
    expected = "row 1, privileged_context: expected a template of the columns prompt, answer; "
    with pytest.raises(ValueError, match=expected):
        load([{"prompt": "2+2", "answer": 4}], privileged_context=context)


def test_without_a_chat_template_prompts_are_plain_text(load):
    ((student, teacher),) = load([{"prompt": "hi"}], chat=False)
    assert student.replace(" ", "") == "hi"
    assert teacher.replace(" ", "") == "bebrief\n\nhi"
    with pytest.raises(ValueError, match="row 1, prompt: messages need a chat template"):
        load([{"prompt": USER}], chat=False)


def test_parquet(load):
    rows = [
        {"prompt": "hi", "privileged_context": None},
        {"prompt": "ho", "privileged_context": "x"},
    ]
    assert len(load(rows, suffix="parquet")) == 2


def test_a_split_of_a_dataset_on_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)))
    load_rows("openai/gsm8k?split=test&name=main")
    load_rows("openai/gsm8k")
    assert asked == [
        (("openai/gsm8k",), {"split": "test", "name": "main"}),
        (("openai/gsm8k",), {"split": "train"}),
    ]


def test_nulls_that_a_table_adds_to_messages(load):
    message = {"role": "user", "content": "hi", "name": None}
    assert load([{"prompt": [message]}]) == load([{"prompt": USER}])


def test_completions_that_are_not_learned_may_be_long(load):
    rows = [{"prompt": "a", "completion": "b" * 250}]
    load(rows)
    with pytest.raises(ValueError, match="row 1, completion: expected at most 5 tokens"):
        load(rows, sft_coef=0.5)


def test_a_missing_file_is_named(load, tmp_path):
    load([{"prompt": "a"}])
    config = load_config(DistillationConfig, tmp_path / "recipe.yaml", [])
    with pytest.raises(OSError, match="nowhere"):
        PromptReader(config, tiny_tokenizer(), Limits(256, 97), {"": Limits(256, 97)}).read(
            str(tmp_path / "nowhere.jsonl")
        )


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    ours = load_tokenizer(str(write_model(tmp_path / "a")))
    compare_tokenizers(ours, str(tmp_path / "a"))
    swapped = tiny_tokenizer(characters="ba" + "cdefghijklmnopqrstuvwxyz")
    theirs = str(write_model(tmp_path / "b", tokenizer=swapped))
    message = r"expected the student's tokenizer, but .*b gives \d+ tokens"
    with pytest.raises(ValueError, match=message):
        compare_tokenizers(ours, theirs)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((97, 97), (97, 97), None),
        ((97, 97), (97, 128), None),  # padding
        ((97, 128), (97, 97), None),
        ((97, 104), (99, 104), None),  # two tokens of the teacher on the student's padding
        ((97, 97), (140, 140), "97 rows, but {} has 140, and only one of them has weights for 43"),
        ((97, 104), (140, 160), "104 rows, but {} has 160, and only one .* weights for 36 tokens"),
        ((97, 97), (97, 60), "97 rows, but {} has 60, and only one .* weights for 37 tokens"),
    ],
)
def test_padding_alone_may_differ_between_vocabularies(tmp_path, student, teacher, message):
    """Each model is given by the numbers of its tokens and of its rows of weights."""
    models, tokenizers = [], []
    for name, (tokens, rows) in (("student", student), ("teacher", teacher)):
        more = "".join(chr(0x400 + i) for i in range(tokens - 97))
        tokenizer = tiny_tokenizer(characters=CHARACTERS + more)
        folder = str(write_model(tmp_path / name, tokenizer=tokenizer, vocab_size=rows))
        models.append(load_model(folder, "float32"))
        tokenizers.append(tokenizer)
    (ours, theirs), pair = models, (tokenizers[0], tokenizers[1])
    compare_tokenizers(pair[0], folder)
    if message is None:
        return check_vocabularies(ours, theirs, pair, folder)
    with pytest.raises(ValueError, match=message.format(folder)):
        check_vocabularies(ours, theirs, pair, folder)


def test_a_run_with_another_vocabulary_is_refused(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    more = "".join(chr(0x400 + i) for i in range(43))
    tokenizer = tiny_tokenizer(characters=CHARACTERS + more)
    teacher = write_model(tmp_path / "teacher", tokenizer=tokenizer, vocab_size=140)
    line = error_line(capsys, "distill", recipe, "--teacher", teacher)
    assert line.startswith("error: teacher: expected a vocabulary of the student's size, 97 rows, ")
    assert "has 140, and only one of them has weights for 43 tokens such as" in line


def test_a_model_in_a_missing_package():
    with pytest.raises(ValueError, match="package 'no_such_package' is missing"):
        load_model("package:no_such_package/model.gguf", "float32")

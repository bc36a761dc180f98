"""Formats and columns of data: each gives the same prompts, and bad rows can be left out."""

import gzip
import json

import datasets
import pandas
import pytest

from opd_trainer.config import DistillationConfig, SFTConfig
from opd_trainer.data import Limits, PromptReader, load_rows
from tests.chat_templates import VOCABULARY, chat_tokenizer, text_of
from tests.tiny_run import error_line, make_trainer, write_recipe

LIMITS = Limits(context=256, ids=VOCABULARY)
ROWS = [{"prompt": "hi", "completion": "ok"}, {"prompt": "ho", "completion": "NA"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _config(stage=SFTConfig, **changes):
    given = {"model": "m", "train_data": "t", "use_cpu": True, "max_completion_length": 64}
    return stage(**given | changes)


def _read(source, style="chatml", **changes):
    """Return prompt and reference of each row, as text."""
    tokenizer = chat_tokenizer(style)
    prompts = PromptReader(_config(**changes), tokenizer, LIMITS, {}).read(str(source), learns=True)
    return [tuple(text_of(tokenizer, x) for x in (p.student_ids, p.reference_ids)) for p in prompts]


def _turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _asked(*turns, said="ok"):
    return "".join(turns) + "<|im_start|>assistant\n", f"{said}<|im_end|>"


HI = _asked(_turn("user", "hi"))


def test_each_format_has_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text(LINES)
    (tmp_path / "bom.csv").write_text("\ufeff" + pandas.DataFrame(ROWS).to_csv(index=False))
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv.gz", index=False)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 9
    for path in files:
        assert list(load_rows(str(path))) == ROWS, path


def test_a_table_of_texts_keeps_them(tmp_path):
    """Numbers keep their digits and NA is a text; an empty cell is missing."""
    (tmp_path / "a.csv").write_text('prompt,answer,teacher\n"a, b",007,\nNA,1e3,t\n')
    assert load_rows(str(tmp_path / "a.csv")) == [
        {"prompt": "a, b", "answer": "007", "teacher": None},
        {"prompt": "NA", "answer": "1e3", "teacher": "t"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}]', "a.json: malformed JSON: .* line 3 c"),
        ("a.json", b'{"prompt": "a"}', "a.json: expected a list of rows, or an object with one l"),
        ("a.json", b"3", "a.json: expected a list of rows"),
        ("a.json", b'{"prompt": "a"}\n{', "a.json, line 2: malformed JSON"),
        ("a.jsonl.gz", b"text", "a.jsonl.gz: expected a gzip file; BadGzipFile"),
        ("a.csv", b"", "a.csv: expected a .jsonl or .parquet file, a .json .*; EmptyDataError"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}
SYSTEM = {"role": "system", "content": "be brief"}
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]
BRIEF = _asked(_turn("system", "be brief"), _turn("user", "hi"))


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "hi", "completion": "ok"}, {}, HI),
        ({"prompt": [USER], "completion": [SAID]}, {}, HI),
        ({"prompt": [SYSTEM, USER], "completion": [SAID]}, {}, BRIEF),
        ({"messages": [USER, SAID]}, {}, HI),
        ({"messages": [SYSTEM, USER, SAID]}, {}, BRIEF),
        ({"messages": json.dumps([USER, SAID])}, {}, HI),
        ({"messages": [USER], "completion": "ok"}, {}, HI),
        ({"conversations": SHAREGPT}, {}, HI),
        ({"conversations": SHAREGPT, "system": "be brief"}, {}, BRIEF),
        ({"conversations": [{"from": "system", "value": "be brief"}, *SHAREGPT]}, {}, BRIEF),
        ({"question": "hi", "answer": "ok"}, {"prompt": "question", "completion": "answer"}, HI),
        ({"chat": SHAREGPT}, {"messages": "chat"}, HI),
        ({"prompt": "ho", "messages": [USER, SAID]}, {"messages": "messages"}, HI),
        ({"prompt": "hi", "completion": "ok", "messages": [SYSTEM, USER, SAID]}, {}, HI),
        ({"prompt": [USER | {"content": [{"type": "text", "text": "h"},
                                         {"type": "text", "text": "i"}]}], "completion": "ok"},
         {}, HI),
        ({"prompt": [USER, SAID | {"content": "o"}], "completion": "k"}, {},
         ("".join(HI)[: -len("k<|im_end|>")], "k<|im_end|>")),
        ({"messages": [USER, SAID, USER, SAID]}, {},
         _asked(_turn("user", "hi"), _turn("assistant", "ok"), _turn("user", "hi"))),
    ],
)  # fmt: skip
def test_each_convention_gives_prompt_and_reference(tmp_path, row, columns, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert _read(tmp_path / "a.jsonl", columns=columns) == [expected]


def test_tool_calls_and_thoughts_of_a_table(tmp_path):
    """A table fills in nulls for what other rows have, and often holds JSON as text."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}  # fmt: skip
    told = {"role": "tool", "content": "4", "name": "f"}
    thought = SAID | {"thinking": "hm"}
    rows = [
        {"messages": [USER, called, told, thought], "tools": json.dumps([tool])},
        {"messages": [USER, SAID], "tools": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (with_tools, reference), plain = _read(tmp_path / "a.parquet", "qwen")
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}'
    turns = _turn("user", "hi") + _turn("assistant", call) + _turn("tool", "4")
    listed = _turn("system", json.dumps(tool) + "\n")
    assert with_tools == f"{listed}{turns}<|im_start|>assistant\n"
    assert reference == "<think>\nhm\n</think>\n\nok<|im_end|>"
    assert plain == (HI[0], "<think>\n\n</think>\n\nok<|im_end|>")


def test_a_scorer_and_a_context_see_mapped_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "2+2", "solution": "4"}\n')
    columns = {"prompt": "question", "answer": "solution"}
    options = {"columns": columns, "privileged_context": "it is {{ answer }}"}
    config = _config(DistillationConfig, **options)
    tokenizer = chat_tokenizer("chatml")
    reader = PromptReader(config, tokenizer, LIMITS, {"": LIMITS})
    (prompt,) = reader.read(str(tmp_path / "a.jsonl"))
    assert (prompt.row["answer"], prompt.row["solution"], prompt.text) == ("4", "4", "2+2")
    assert text_of(tokenizer, prompt.teacher_ids).startswith(_turn("system", "it is 4"))


def test_variables_of_a_row(tmp_path):
    row = {"prompt": "hi", "completion": "ok", "chat_template_kwargs": {"enable_thinking": False}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    ((prompt, reference),) = _read(tmp_path / "a.jsonl", "qwen")
    assert (prompt, reference) == (HI[0] + "<think>\n\n</think>\n\n", "ok<|im_end|>")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"q": "hi"}, {"columns": {"prompt": "question"}},
         "row 1, columns: expected a column 'question' for prompt, got q"),
        ({"q": "hi"}, {}, r"row 1, prompt: field required, got .*; set columns if it is call"),
        ({"prompt": "hi"}, {}, "completion: missing; generate_from: expected a completion in eve"),
        ({"prompt": "hi", "completion": [USER]}, {}, "row 1, completion: .* one message of the as"),
        ({"prompt": "hi", "completion": [SAID, USER, SAID]}, {}, "completion: .* one message of "),
        ({"messages": 3}, {}, "row 1, prompt: .*valid list"),
        ({"messages": "no JSON"}, {}, "row 1, messages: malformed JSON: Expecting value"),
        ({"prompt": "hi", "completion": "ok", "tools": "[{"}, {}, "row 1, tools: .*JSON"),
        ({"prompt": [USER | {"content": [{"type": "image", "image": "x"}]}]}, {},
         "row 1, prompt: .*expected a text or parts .*, got image"),
        ({"conversations": [{"from": "wizard", "value": "hi"}]}, {}, "row 1, prompt: .*'tool'"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(tmp_path, row, changes, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "a.jsonl", **changes)


def test_bad_rows_are_dropped_and_counted(tmp_path, capsys):
    bad = ["{", "[1]", '{"prompt": 3}', '{"prompt": "a"}', json.dumps({"prompt": "a" * 300})]
    bad += [json.dumps({"prompt": "a", "completion": "b" * 64})]
    lines = LINES.splitlines()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([lines[0], *bad, lines[1]]))
    assert _read(path, on_bad_row="drop") == [HI, _asked(_turn("user", "ho"), said="NA")]
    first = f"{path}, line 2: malformed JSON: Expecting property name enclosed in double quotes"
    said = f"data: dropped 6 of 8 rows (on_bad_row: drop); the first: {first}\n"
    assert capsys.readouterr().out == said
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: malformed JSON"):
        _read(path)
    path.write_text("\n".join(bad[1:]))
    with pytest.raises(ValueError, match=r"expected at least one prompt, got 5 bad rows; the firs"):
        _read(path, on_bad_row="drop")


def test_a_run_without_its_bad_rows(tmp_path, capsys):
    write_recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a" * 300}) + "\n")
    recipe = write_recipe(tmp_path)
    line = error_line(capsys, "distill", recipe)
    assert "row 13, prompt: expected 1 to 250 tokens" in line
    assert line.endswith("; on_bad_row: drop leaves such rows out")
    trainer = make_trainer(tmp_path, on_bad_row="drop")
    assert [p.text for p in trainer.train_dataset] == [f"say {i}" for i in range(12)]
    assert "data: dropped 1 of 13 rows" in capsys.readouterr().out

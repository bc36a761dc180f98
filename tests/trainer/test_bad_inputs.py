"""Wrong recipes, data, models, functions and run directories: each ends the command with one line
that says where, what was expected and what came.
"""

import json
import re
import shutil
import struct

import pandas
import pytest
import torch

from opd_kernels import LazyLogits
from opd_trainer.__main__ import main
from opd_trainer.config import DistillationConfig
from opd_trainer.data import Limits, PromptReader, load_rows
from opd_trainer.errors import RunStoppedError
from opd_trainer.measures.scoring import load_scorer
from opd_trainer.stages.distillation import build_loss
from tests.tiny_run import error_line, tiny_tokenizer, write_recipe

LIMITS = Limits(context=256, ids=97)


def _config(**changes):
    given = {"model": "m", "train_data": "t", "privileged_context": "be brief", "use_cpu": True}
    return DistillationConfig(**given | {"max_completion_length": 6} | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected `key: value` lines in .*x.yaml, got None"),
        (b"- a list", "expected `key: value` lines in .*x.yaml, got "),
        (b"model: [a", "expected `key: value` lines in .*x.yaml; ParserError: .* line 1"),
        (b"model:\n\t- a", "x.yaml; ScannerError: .*line 2, column 1"),
        (b"k: 1\nseed: 2\nk: 3\n", "x.yaml; k is given twice, last .*line 4"),
        (b"privileged_context: [{role: user, role: user}]", "x.yaml; role is given twice"),
        (b"k: 1\n---\nk: 2\n", "x.yaml; ComposerError: expected a single document"),
        (b"model: caf\xe9", "x.yaml; UnicodeDecodeError: .*0xe9"),
        (b"model: " + b"[" * 3000, "x.yaml; RecursionError"),
        (b"model: a\nteacher: &a {b: [*a]}", "x.yaml; it contains itself.*line 2, column 10"),
        (b"k: !own 3", "x.yaml; ConstructorError: .*!own"),
        (b"5: 3", "error: 5: unknown key"),
        (b"temprature: 1", "error: temprature: unknown key; did you mean 'temperature'"),
        (b"k: 1", "error: model: missing; set it in .*x.yaml or pass --model"),
    ],
)
def test_yaml(tmp_path, capsys, text, message):
    (tmp_path / "x.yaml").write_bytes(text)
    assert re.search(message, error_line(capsys, "distill", tmp_path / "x.yaml"))


def test_yaml_runs_nothing(tmp_path, capsys):
    tag = f"!!python/object/apply:os.system ['touch {tmp_path}/there']"
    recipe, message = tmp_path / "x.yaml", "ConstructorError: .*python/object/apply:os.system"
    recipe.write_text(f"k: {tag}")
    assert re.search(f"x.yaml; {message}", error_line(capsys, "distill", recipe))
    recipe.write_text("k: 1")
    line = error_line(capsys, "distill", recipe, "--k", tag)
    assert re.search(f"k: expected a value as in YAML, got .*; {message}", line)
    line = error_line(capsys, "distill", recipe, "--chat_template_kwargs", "&a {b: *a}")
    assert re.search("chat_template_kwargs: expected a value as in YAML, .*contains itself", line)
    assert list(tmp_path.iterdir()) == [recipe]


def _long(tokens):
    return json.dumps({"prompt": "a" * tokens})


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (b"", {}, "rows.jsonl: expected at least one prompt, got none"),
        (b"\n \n", {}, "rows.jsonl: expected at least one prompt, got none"),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', {}, "rows.jsonl, line 2: malformed JSON: Exp"),
        ('{"prompt": "a"}\n{"prompt": "b', {}, "rows.jsonl, line 2: malformed JSON: Unterminated"),
        ('{"prompt": "a"}\n{"prompt": \n', {}, "rows.jsonl, line 2: malformed JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', {}, "rows.jsonl, line 2: .*0xff in position 12"),
        ('{"prompt": "a"}'.encode("utf-16"), {}, "rows.jsonl, line 1: .*codec can't decode"),
        ("[" * 100_000, {}, "rows.jsonl, line 1: malformed JSON: maximum recursion"),
        ('{"n": ' + "9" * 5000 + "}", {}, "rows.jsonl, line 1: .*4300 digits"),
        ('{"prompt": "a"}\n[1]\n', {}, r"rows.jsonl, row 2, row: .*got \[1\]"),
        ("null", {}, "rows.jsonl, row 1, row: .*valid dictionary.*, got None"),
        ('{"question": "a"}', {}, "row 1, prompt: field required, got {'question': 'a'}"),
        (f'{_long(1)}\n{{"prompt": 3}}', {}, "row 2, prompt: .*got {'prompt': 3}"),
        ('{"prompt": NaN}', {}, "row 1, prompt: .* a valid string or a valid list, got .*nan"),
        ('{"prompt": ""}', {}, "row 1, prompt: string should have at least 1 character"),
        ('{"prompt": []}', {}, "row 1, prompt: .*list should have at least 1 item"),
        (r'{"prompt": "\ud800"}', {}, "row 1, prompt: .*unable to parse raw data as a unicode"),
        ('{"prompt": [{"role": "user"}]}', {}, "row 1, prompt: .*field required"),
        ('{"prompt": [{"content": "a"}]}', {}, "row 1, prompt: .*field required"),
        ('{"prompt": [{"role": "user", "content": "a", "x": 1}]}', {}, "extra inputs are not perm"),
        (
            '{"prompt": [{"role": "wizard", "content": "a"}]}',
            {},
            "row 1, prompt: .*'system', 'developer', 'user', 'assistant' or 'tool', got .*wizard",
        ),
        (f"{_long(1)}\n{_long(250)}", {},
         "row 2, prompt: expected 1 to 250 tokens, the student's context of 256 .*, got 255"),
        (_long(1), {"privileged_context": None}, "row 1, privileged_context: missing"),
        (_long(1), {"privileged_context": "{{ answer }}"}, "columns prompt; .*'answer' is undef"),
        (_long(1), {"privileged_context": "{{ 1 / 0 }}"}, "columns prompt; ZeroDivisionError"),
        (_long(1), {"chat_template_kwargs": {"tools": 5}}, "chat_template_kwargs; TypeError"),
        (_long(1), {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs; TypeError"),
    ],
)  # fmt: skip
def test_rows(tmp_path, text, changes, message):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    reader = PromptReader(_config(**changes), tiny_tokenizer(), LIMITS, {"": LIMITS})
    with pytest.raises(ValueError, match=message):
        reader.read(str(source))


def test_a_row_of_no_teacher(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "teacher": "c"}\n')
    config = _config(teacher={"a": "one", "b": "other"})
    reader = PromptReader(config, tiny_tokenizer(), LIMITS, {"a": LIMITS, "b": LIMITS})
    with pytest.raises(ValueError, match="row 1, teacher: expected one of a, b, got 'c'"):
        reader.read(str(tmp_path / "rows.jsonl"))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert load_rows(str(tmp_path / "rows.jsonl")) == [{"prompt": "a"}]


def test_tables(tmp_path):
    table = pandas.DataFrame({"prompt": ["a", float("nan")]})
    table.to_parquet(tmp_path / "nan.parquet")
    reader = PromptReader(_config(), tiny_tokenizer(), LIMITS, {"": LIMITS})
    with pytest.raises(ValueError, match=r"nan.parquet, row 2, prompt: .*got {'prompt': None}"):
        reader.read(str(tmp_path / "nan.parquet"))
    (tmp_path / "text.parquet").write_text("a table")
    for source in ("text.parquet", "nowhere.parquet", "nowhere.csv"):
        expected = rf"{source}: expected a .jsonl or .parquet file, .*; \w+: "
        with pytest.raises(ValueError, match=expected):
            load_rows(str(tmp_path / source))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Return the folder of a valid recipe."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    return folder


@pytest.fixture
def folder(tmp_path, valid):
    """Return a copy of that folder."""
    return shutil.copytree(valid, tmp_path / "copy")


CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRUNCATED_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 10, 10)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG, None, "Should have a `model_type` key"),
        (CONFIG, lambda _: b"{", "is not a valid JSON file"),
        (CONFIG, lambda _: b"[]", "TypeError: .*not list"),
        (CONFIG, lambda _: b'{"model_type": "wizard"}', "model type `wizard`"),
        (CONFIG, lambda x: x.replace(b'"hidden_size": ', b'"hidden_size": "x",\n"y": '), "got str"),
        (CONFIG, lambda x: x.replace(b'"vocab_size": 97', b'"vocab_size": 50'), "mismatched"),
        (
            CONFIG,
            lambda x: x.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
            r"it lacks weights, such as model\.layers\.2\.input_layernorm",
        ),
        (WEIGHTS, None, "no file named model.safetensors"),
        (WEIGHTS, lambda x: x[:-1000], "SafetensorError: .*file not fully covered"),
        (WEIGHTS, lambda _: b"", "SafetensorError"),
        (WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\n", "SafetensorError"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer.json", lambda _: b"{}", "KeyError"),
        ("adapter_config.json", lambda _: b"{}", "Cannot infer the auto class"),
        ("x.gguf", lambda _: b"a text" * 100, "is not a GGUF file"),
        ("x.gguf", lambda _: TRUNCATED_GGUF, "buffer of at least"),
    ],
)
def test_models(folder, capsys, file, change, message):
    model = path = folder / "model" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    if path.suffix != ".gguf":
        model = folder / "model"
    line = error_line(capsys, "distill", folder / "recipe.yaml", "--model", model,
                 "--output_dir", folder / "run")  # fmt: skip
    expected = rf"model '{model}': expected the directory, hub name or .gguf of a causal .*; .*"
    assert re.search(expected + message, line)


def test_keys_that_a_model_tells(folder, capsys):
    recipe, run = folder / "recipe.yaml", ("--output_dir", folder / "run")
    line = error_line(
        capsys, "distill", recipe, "--lora_r", 2, "--lora_target_modules", "no[", *run
    )
    assert re.search("lora_target_modules: expected names .*; .*unterminated", line)
    for file in ("t", "nowhere"):
        line = error_line(capsys, "distill", recipe, "--teacher", folder / file, *run)
        assert re.search(f"model '{folder}/{file}': expected the directory", line)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(text, row): return row['answer']", "KeyError: 'answer'"),
        ("def f(text, row): return 1 / 0", "ZeroDivisionError"),
        ("def f(text, row): return '1'", "got '1'"),
        ("def f(text, row): return float('nan')", "got nan"),
        ("def f(text, row): return None", "TypeError: .*NoneType"),
        ("def f(text, row): return [1]", "TypeError: .*list"),
        ("def f(text): return 1", "TypeError: .*takes 1 positional argument but 2"),
    ],
)
def test_scorers(tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    scorer = load_scorer(_config(scorer=f"{tmp_path}/own.py:f"))
    expected = f"scorer: expected a finite number of 'a text'; {message}"
    with pytest.raises(RunStoppedError, match=expected):
        scorer("a text", {"prompt": "p"})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(text", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError"),
        ("f = 3", "has no such function"),
        ("", "has no such function"),
        (None, "FileNotFoundError"),
    ],
)
@pytest.mark.parametrize("key", ["scorer", "objective"])
def test_files_of_functions(tmp_path, key, code, message):
    file = tmp_path / "own.py"
    if code is not None:
        file.write_text(code)
    config = _config(**{key: f"{file}:f"})
    expected = (
        rf"{key}: expected .*, file.py:function or module:function, got '{file}:f'.*{message}"
    )
    with pytest.raises(ValueError, match=expected):
        (load_scorer if key == "scorer" else build_loss)(config)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("return s.values.sum()", r"shape \(5,\), got \(\)"),
        ("return s.values", r"shape \(5,\), got \(5, 3\)"),
        ("return None", "got NoneType"),
        ("return 1.0", "got float"),
        ("return s.values.sum(-1).detach()", "no gradient with respect to the student"),
        ("return s.values.sum(-1) > 0", "a floating tensor"),
    ],
)
def test_objectives(tmp_path, code, message):
    (tmp_path / "own.py").write_text(f"def f(s, t):\n    {code}\n")
    loss = build_loss(_config(objective=f"{tmp_path}/own.py:f", k=3))
    student, teacher = (
        LazyLogits(torch.randn(5, 4, requires_grad=wanted), torch.randn(11, 4))
        for wanted in (True, False)
    )
    expected = rf"objective: expected a loss per token .*own.py:f; .*{message}"
    with pytest.raises(RunStoppedError, match=expected):
        loss(student, teacher)


@pytest.mark.parametrize("key", ["scorer", "objective"])
def test_a_function_that_raises_ends_a_run(folder, capsys, key):
    (folder / "own.py").write_text("def f(a, b):\n    raise KeyError('x')\n")
    line = error_line(capsys, "distill", folder / "recipe.yaml", f"--{key}", f"{folder}/own.py:f",
                 "--tail", "drop", "--output_dir", folder / "run")  # fmt: skip
    assert re.search(f"{key}: expected .*KeyError: 'x'; go on with --resume", line)


def test_a_scorer_that_raises_at_the_end(folder, capsys):
    (folder / "own.py").write_text("def f(a, b):\n    raise KeyError('x')\n")
    changes = {"scorer": f"{folder}/own.py:f", "eval_on_start": "false", "max_steps": 1}
    options = [x for key, value in changes.items() for x in (f"--{key}", value)]
    run = folder / "run"
    line = error_line(capsys, "distill", folder / "recipe.yaml", *options, "--output_dir", run)
    assert re.search("scorer: expected .*KeyError: 'x'", line)
    assert (run / "model" / WEIGHTS).exists()


LOG = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no metrics.jsonl"),
        ({"metrics.jsonl": b'{"step": 1, "lo}\n' + LOG}, "metrics.jsonl, line 1: malformed JSON"),
        ({"metrics.jsonl": b"\xff\n" + LOG}, "metrics.jsonl, line 1: malformed JSON: .*0xff"),
        ({"metrics.jsonl": b'{"loss": 1}\n'}, "KeyError: 'step'"),
        ({"metrics.jsonl": b"[1]\n"}, "AttributeError: 'list'"),
        ({"metrics.jsonl": b'{"step": null, "loss": 1}\n' + LOG}, "TypeError: "),
        ({"metrics.jsonl": LOG, "config.json": b"{"}, "JSONDecodeError: "),
        ({"metrics.jsonl": LOG, "samples/step-1.jsonl": b'{"prompt": "a"}\n'}, "KeyError: 'stu"),
    ],
)
def test_directories_that_are_no_run(tmp_path, capsys, files, message):
    run = _write_run(tmp_path, files)
    line = error_line(capsys, "report", run, "--output", tmp_path / "page.html")
    assert re.search(f"error: {run}: expected a recipe's output_dir; .*{message}", line)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "a": {}', b"\0\0\0", b"\xe2"])
def test_a_killed_run_can_be_reported(tmp_path, tail):
    samples = b'{"prompt": "p", "student": "written", "score": 1}\n'
    files = {"metrics.jsonl": LOG + tail, "samples/step-2.jsonl": samples + tail}
    run = _write_run(tmp_path, files)
    main(["report", str(run), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "step 2: 0.4" in page
    assert "written" in page


def _write_run(folder, files):
    for name, content in files.items():
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "run"

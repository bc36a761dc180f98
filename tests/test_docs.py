"""README and docs/: the files and tests that they name exist, their code runs and prints what they
show, and the site builds without a warning and makes no network request.
"""

import ast
import dataclasses
import doctest
import functools
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import opd_kernels
from opd_kernels import LazyLogits, SparseLogits, memory
from tests.browser import needs_browser, open_page
from tests.tiny_models import tiny_batch, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VOCAB = 97  # of the tiny models
README_WORDS = 1400
NOT_RUN = "<!-- not run: "  # in the line above a block, followed by a reason

_TEST = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#([^)]*))?\)")
_REMOTE = re.compile(
    r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//""", re.IGNORECASE
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names_in(path):
    """The names of a test file's tests."""
    names = [node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")]
    return {name for name in names if name.startswith("test_")}


def missing_tests(text, root=ROOT):
    """The tests that a text names and that do not exist."""
    return [
        f"{file}::{name}" for file, name in _TEST.findall(text)
        if not (root / file).exists() or name not in names_in(root / file)
    ]  # fmt: skip


def anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def missing_paths(text, root=ROOT, links_from=ROOT):
    """The paths that a text names in code or links to and that do not exist.

    A path is a word in code that begins with a folder of the repository or ends like a source
    file. A file name without a folder may be anywhere. Folders that runs write do not count.
    """
    folders = {path.name for path in root.iterdir() if path.is_dir()} - {"runs", "build"}
    missing = [
        link for link, anchor in _LINK.findall(text)
        if not (links_from / link).exists() or (anchor and anchor not in anchors(links_from / link))
    ]  # fmt: skip
    for word in _CODE.findall(text):
        path = word.partition("::")[0]
        if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", path):
            continue
        if path.partition("/")[0] in folders and "/" in path:
            found = any(root.glob(path))
        elif "/" not in path and path.endswith((".py", ".toml")):
            found = any(root.glob(path)) or any(
                path == found.name for folder in folders for found in (root / folder).rglob(path)
            )
        else:
            continue
        if not found:
            missing.append(path)
    return missing


@dataclass
class Block:
    """A fenced block: its language, text and first line, and the line above it."""

    language: str
    text: str
    line: int
    above: str


def blocks(page):
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        above = before.rstrip("\n").rpartition("\n")[2]
        found.append(Block(fence[1], fence[2], before.count("\n") + 2, above))
    return found


def pages_with(*languages):
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


@named([*PAGES, ROOT / "CONTRIBUTING.md"])
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert missing_tests(text) == []
    assert missing_paths(text, links_from=page.parent) == []


def test_a_name_that_does_not_exist_is_found(tmp_path):
    here = "tests/test_docs.py::test_a_name_that_does_not_exist_is_found"
    assert missing_tests(f"`{here}` {here}s tests/test_nowhere.py::test_x") == [
        f"{here}s",
        "tests/test_nowhere.py::test_x",
    ]
    text = "`tests/test_docs.py` `tests/nowhere.py` `setup.py` `errors.py` `gone.py` `runs/x/y.py`"
    text += " [a](README.md#x) [b](docs/none.md) `recipes/*.yaml` `benchmarks/none/` `a / b`"
    links = ["README.md", "docs/none.md"]
    assert missing_paths(text) == [*links, "tests/nowhere.py", "gone.py", "benchmarks/none/"]
    assert missing_paths("[a](README.md#the-tree) [b](docs/index.md)") == []


def listed_files(tree):
    """The files that a drawn tree lists, each below the folders that it is indented by."""
    found, folders = [], {}
    for line in tree.splitlines():
        names = re.match(r"( {0,8})((?:[\w]+(?:\.py|/) ?)+)( |$)", line)
        if names is None:
            continue
        depth = len(names[1])
        parents = [folder for indent, folder in sorted(folders.items()) if indent < depth]
        for name in names[2].split():
            if name.endswith("/"):
                folders = {indent: f for indent, f in folders.items() if indent < depth}
                folders[depth] = name
            else:
                found.append("".join([*parents, name]))
    return found


def test_files_of_a_drawn_tree():
    tree = "a/      the folder a/\n  x.py y.py\n          says z.py\n  b/\n    z.py  last\n  w.py\n"
    assert listed_files(tree) == ["a/x.py", "a/y.py", "a/b/z.py", "a/w.py"]


def test_the_tree_lists_every_file_once():
    page = ROOT / "docs" / "architecture.md"
    tree = next(block.text for block in blocks(page) if block.text.startswith("csrc/"))
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in ("opd_kernels", "trainer")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(listed_files(tree)) == sorted(files)


def test_the_readme_takes_two_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_the_chart_shows_the_table_of_performance():
    peers = runpy.run_path(str(ROOT / "docs" / "peers.py"))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert (ROOT / "docs" / "peers.svg").read_text() == peers["chart"](page)
    rows = {name: numbers for name, *numbers in peers["rows"](page)}
    assert rows["opd_kernels, method=one_pass"] == [0.95, 171]
    assert len(rows) == 7
    text = re.sub("[,*]", "", (ROOT / "README.md").read_text())
    assert all(f"{memory:.0f} |" in text for _, memory in rows.values())


@pytest.fixture
def namespace():
    """The names that code on the pages uses without defining them."""
    model, teacher_model = tiny_model("llama"), tiny_model("qwen3", seed=1)
    input_ids, attention_mask = tiny_batch()
    weight = model.lm_head.weight
    hidden = torch.randn(12, weight.shape[1], requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(12, 24), torch.randn(VOCAB, 24)
    student, teacher = LazyLogits(hidden, weight), LazyLogits(teacher_hidden, teacher_weight)
    best = teacher.materialize().log_softmax(-1).topk(8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = {name: getattr(opd_kernels, name) for name in opd_kernels.__all__}
    yield names | {
        "torch": torch, "model": model, "teacher_model": teacher_model, "input_ids": input_ids,
        "attention_mask": attention_mask, "completion_mask": attention_mask.float(),
        "batches": [input_ids] * 3,
        "hidden": hidden, "weight": weight, "lm_head": model.lm_head, "teacher": teacher,
        "teacher_hidden": teacher_hidden, "t_hidden": teacher_hidden, "student": student,
        "teacher_weight": teacher_weight, "t_weight": teacher_weight,
        "sampled_ids": torch.randint(VOCAB, (12,)), "group": dist.group.WORLD,
        "served": SparseLogits.from_log_probs(best.values, best.indices, vocab_size=VOCAB),
    }  # fmt: skip
    dist.destroy_process_group()


@named(pages_with("python"))
def test_python_on_a_page_runs(page, namespace, capsys):
    """The blocks of a page run in order and may use names of earlier blocks."""
    ran = 0
    for block in blocks(page):
        if block.language != "python" or block.text.startswith("--8<--"):  # tests/test_examples.py
            continue
        if block.above.startswith(NOT_RUN):
            assert block.above.removeprefix(NOT_RUN).rstrip(" ->"), f"{page}:{block.line}: why?"
            continue
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, page, "exec"), namespace)
        ran += 1
    assert ran or page.name == "examples.md"
    losses = [x for x in namespace.values() if isinstance(x, torch.Tensor) and x.dim() == 0]
    assert all(torch.isfinite(loss) for loss in losses)


@named(pages_with("pycon"))
def test_sessions_on_a_page_give_what_they_show(page):
    for block in blocks(page):
        if block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, {}, page.name, page.name, 0)
            runner, said = doctest.DocTestRunner(), []
            runner.run(test, out=said.append)
            assert runner.tries > 4
            assert runner.failures == 0, "".join(said)


@named(pages_with("console"))
def test_a_commands_output_is_what_it_prints(page, monkeypatch, capsys):
    for block in blocks(page):
        if block.language == "console":
            command, _, shown = block.text.partition("\n")
            arguments = command.removeprefix("$ python -m opd_kernels.memory ").split()
            assert len(arguments) < len(command.split()) - 3
            monkeypatch.setattr("sys.argv", ["memory", *arguments])
            memory.main()
            assert capsys.readouterr().out == shown


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text() + (ROOT / "docs" / "integrations.md").read_text()
    listed = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    public = [f"opd_kernels.{name}" for name in opd_kernels.__all__]
    modules = [f"opd_kernels.integrations.{path.stem}" for path in
               (ROOT / "opd_kernels" / "integrations").glob("[a-z]*.py")]  # fmt: skip
    others = ["opd_kernels.parallel", "opd_kernels.memory"]
    assert sorted(listed) == sorted(public + modules + others)
    for owner, members in re.findall(r"^::: ([\w.]+)\n    options:\n(?: .*\n)*? +members: \[(.*)\]",
                                     text, re.MULTILINE):  # fmt: skip
        for name in members.split(", "):
            assert hasattr(pkgutil.resolve_name(owner), name), f"{owner}: {name}"


def test_every_example_is_on_its_page():
    shown = re.findall(
        r'^--8<-- "(examples/\w+\.py)"$', (ROOT / "docs" / "examples.md").read_text(), re.MULTILINE
    )
    assert sorted(shown) == sorted(f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site as `make docs` builds it, the exit code, and the build's output."""
    pytest.importorskip("mkdocs", reason="pip install 'opd-kernels[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    silent = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=silent)
    return folder, built.returncode, built.stdout + built.stderr


def test_the_site_is_built_without_a_warning(site):
    folder, code, said = site
    assert code == 0, said
    assert [line for line in said.splitlines() if not line.startswith("INFO")] == []
    names = {path.stem for path in PAGES} - {"README"}
    assert names | {"404"} == {path.stem for path in folder.glob("*.html")}
    assert list(folder.rglob("*.py*")) == []  # no hooks.py, peers.py or compiled file
    for path in folder.glob("*.html"):
        text = path.read_text()
        assert not _REMOTE.search(text)
        assert "arithmatex" not in text
        assert "<!-- fields" not in text


def test_formulas_are_mathml(site):
    folder, text = site[0], (ROOT / "docs" / "mathematics.md").read_text()
    blocks_of_tex, page = text.count("$$") // 2, (folder / "mathematics.html").read_text()
    assert page.count('display="block"') == blocks_of_tex > 8
    assert page.count("<math") > 60
    assert not re.search(r"\\[a-z]+|\[1ex\]", re.sub("<[^>]*>", "", page[page.index("<article") :]))


def test_every_key_of_a_recipe_is_on_its_page(site):
    config = pytest.importorskip("opd_trainer.config")
    text = (site[0] / "recipe_keys.html").read_text()
    for stage in ("StageConfig", "TeacherConfig", "DistillationConfig", "SFTConfig", "RLVRConfig",
                  "EvaluationConfig"):  # fmt: skip
        keys = getattr(config, stage).__annotations__.keys()
        for key in keys - {"REQUIRED"}:
            assert f"<td><code>{key}</code></td>" in text, f"{stage}: {key}"
    row = re.search(r"<td><code>micro_batch_size</code></td>(.*?)</tr>", text, re.DOTALL)
    cells = re.findall(r"<td>(.*?)</td>", row[1])
    default = next(f.default for f in dataclasses.fields(config.StageConfig)
                   if f.name == "micro_batch_size")  # fmt: skip
    comment = "completions per forward and backward pass"
    assert cells == ["int ≥ 1", f"<code>{default}</code>", comment]


def test_fields_of_a_config():
    pytest.importorskip("latex2mathml", reason="pip install 'opd-kernels[docs]'")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    source = '''
from typing import Annotated, ClassVar, Literal
Count = Annotated[int, Field(ge=1)]
@dataclass
class Config(Base):
    """The keys of a stage."""
    REQUIRED: ClassVar[tuple[str, ...]] = ()
    model: str = field(kw_only=True)  # a name
    # One of two,
    # whichever.
    kind: Literal["a", "b"] | None = None
    k: Count = 20  # of the top-K
    options: dict[str, int] = field(default_factory=dict)
'''
    assert hooks["fields"](source, "Config").splitlines() == [
        "The keys of a stage.",
        "",
        "| key | values | default | |",
        "|---|---|---|---|",
        "| `model` | str |  | a name |",
        "| `kind` | a, b |  | One of two, whichever. |",
        "| `k` | int ≥ 1 | `20` | of the top-K |",
        "| `options` | dict[str, int] | `{}` |  |",
    ]


@needs_browser
@pytest.mark.parametrize("page", ["index", "mathematics", "api"])
def test_a_page_in_a_browser(site, tmp_path, page):
    """The page requests its own files only, and nothing is wider than the window."""
    handler = functools.partial(QuietHandler, directory=site[0])
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = f"http://127.0.0.1:{server.server_port}/"
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    shown = open_page(f"{own}{page}.html", tmp_path / "page.png", width=1000, script=wide)
    server.shutdown()
    server.server_close()
    assert shown["errors"] == []
    assert any(request.endswith("/site.css") for request in shown["requests"])
    assert [request for request in shown["requests"] if not request.startswith(own)] == []
    assert shown["value"] == 0
    assert "opd_kernels" in shown["text"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

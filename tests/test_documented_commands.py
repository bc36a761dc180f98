"""A test runs every command that a page, a comment or a docstring names, or there is a reason."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from opd_kernels import memory
from tests.test_docs import missing_tests

ROOT = Path(__file__).parents[1]
RECIPES = "tests/trainer/test_recipes.py::test_a_recipe_runs_on_a_tiny_model"
BENCHMARKS = "tests/benchmarks/test_benchmarks.py::test_"
RUN = {
    "python -m benchmarks compare": f"{BENCHMARKS}compare_writes_tables_records_and_plots",
    "python -m benchmarks trainer_step": f"{BENCHMARKS}trainer_step_does_the_same_work_as_trl",
    "python -m benchmarks roofline": f"{BENCHMARKS}roofline_writes_a_table_records_and_a_plot",
    "python -m benchmarks chunks": (
        "tests/benchmarks/test_commands.py::test_chunks_compares_the_orders"
    ),
    "python -m benchmarks filter": (
        "tests/benchmarks/test_commands.py::test_the_filter_loses_less_with_a_smaller_threshold"
    ),
    "python -m benchmarks audit": "tests/benchmarks/test_audit.py::test_triton",
    "python -m benchmarks.paper": (
        "tests/benchmarks/test_paper.py::test_every_claim_reports_what_its_runs_logged"
    ),
    "python -m opd_kernels.memory": (
        "tests/test_memory.py::test_the_command_reads_a_models_config"
    ),
    "python -m tests.cuda_emulator.fuzz": "tests/backends/test_cuda.py::test_random_problems",
    "python -m tests.walks.causal_lms": (
        "tests/integrations/test_transformers.py::test_the_walk_over_all_classes_tells_what_works"
    ),
    "python docs/peers.py": "tests/test_documented_commands.py::test_the_chart_is_drawn",
    "python examples/training_loop.py": "tests/test_examples.py::test_an_example_learns",
    "torchrun": (
        "tests/trainer/test_recipes.py::test_a_recipe_of_several_ranks_runs_by_torchrun"
    ),
    "accelerate launch": (
        "tests/trainer/test_parallel.py"
        "::test_runs_under_accelerates_fsdp2_are_those_under_ddp_and_resume"
    ),
    "pip install": "tests/test_build.py::test_without_a_compiler_the_torch_backend_is_installed",
    "opd-train init": (
        "tests/trainer/test_command_line.py::test_init_writes_recipes_that_load_from_anywhere"
    ),
    "python -m tests.trainer.training_arguments": (
        "tests/trainer/test_training_arguments.py::test_the_page_lists_what_happens_to_each_key"
    ),
    "make demo": "tests/test_demo.py::test_the_demo_internalises_its_rule",
    "make docs": "tests/test_docs.py::test_the_site_is_built_without_a_warning",
    "make bench": "tests/test_documented_commands.py::test_the_epilogues_are_timed",
} | {
    f"{program} {stage}": RECIPES
    for program in ("opd-train", "python -m opd_trainer")
    for stage in ("distill", "sft", "rlvr", "evaluate", "report")
}  # fmt: skip
# The recipes of these targets are commands of the table above.
RUN |= {f"make {x}": RUN[f"python -m benchmarks {x}"] for x in ("compare", "roofline")}
RUN |= {"make causal-lms": RUN["python -m tests.walks.causal_lms"]}
RUN |= {"make paper": RUN["python -m benchmarks.paper"]}
NOT_RUN = {
    "python -m benchmarks tune": "needs a GPU; tests/benchmarks/test_tune.py runs its parts",
    "python -m benchmarks gpu": "needs a GPU; tests/benchmarks/test_tune.py runs its parts",
    "make gpu": "needs a GPU",
    "python -m tests.walks.mutants": "runs other tests for ten minutes",
    "make mutants": "runs other tests for ten minutes",
    "make test": "runs this test",
    "make check": "runs a part of make test",
    "make lint": "a part of make test",
    "make test-slow": "runs the tests that are marked slow",
    "make fuzz": "runs ten times the examples of make test",
    "make faults": "runs tests of make test and slow ones",
    "make coverage": "runs make test",
    "make sanitize": "runs tests of make test on a build that takes minutes",
    "make triton-versions": "downloads four versions of Triton for tests of make test",
    "make test-vllm": "needs an environment of its own",
    "python -m http.server": "serves the site until it is stopped",
    "python -m mkdocs": "make docs",
    "python -m pip": "make installs with it",
    "python -m pytest": "runs other tests",
    "python -m venv": "make installs with it",
    "pre-commit install": "changes the repository's hooks",
    "python tests/vllm/install.py": "makes the environment of make test-vllm",
}

_PROGRAM = re.compile(
    r"(?:\bpython|\$\(PYTHON\)) (?:-m [\w.]*\w|(?:docs|examples|tests)/[\w/]+\.py)(?=[\s`)])"
    r"[^`\x22)\n]*|\b(?:torchrun|accelerate launch) --[^`\x22)\n]*"
    r"|(?:^|`)(?:OPD_\w+=\S+ )*(?:opd-train [a-z]+|pip install|pre-commit) [^`\x22)\n]*",
    re.MULTILINE,
)
_TARGET = re.compile(
    r"[`(]make ([a-z][a-z-]*)[^`\x22)\n]*[`)]|^(?:# +| {4})?make ([a-z-]+)", re.MULTILINE
)


def files() -> Iterator[Path]:
    """The files in which somebody looks for commands."""
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run"))
    yield from (ROOT / "docs").glob("*.md")
    yield from (ROOT / "recipes").rglob("*.yaml")
    for folder in ("opd_kernels", "trainer", "benchmarks", "examples", "docs", "tests"):
        yield from (p for p in (ROOT / folder).rglob("*.py") if p != Path(__file__))


def commands_in(text: str) -> list[list[str]]:
    """The words of each command, without a comment behind it."""
    text = re.sub(r"\s*\\\n[#\s]*", " ", text)
    found = [x.strip("`").replace("$(PYTHON)", "python") for x in _PROGRAM.findall(text)]
    return [shlex.split(re.split(r"\s+#|  +|,? which|\.$", x)[0]) for x in found]


def targets() -> set[str]:
    """The targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    return set(phony[1].split())


def name_of(words: list[str]) -> str:
    """The program, and its stage or subcommand."""
    while words[0].startswith("OPD_"):
        words = words[1:]
    if words[0] in ("torchrun", "accelerate", "pip", "pre-commit"):
        return " ".join(words[: 1 + (words[0] != "torchrun")])
    length = 2 if words[0] == "opd-train" or words[1] != "-m" else 3
    has_part = words[:length][-1] in ("benchmarks", "opd_trainer")
    return " ".join(words[: length + has_part])


def found() -> dict[str, list[list[str]]]:
    """Every command, by its name."""
    by_name: dict[str, list[list[str]]] = {}
    for path in files():
        text = path.read_text(encoding="utf-8")
        for words in commands_in(text):
            # The name of a program alone, or a line of usage, is no command.
            if words[-1] not in ("benchmarks", "opd_trainer") and "STAGE" not in words:
                by_name.setdefault(name_of(words), []).append(words)
        for quoted, plain in _TARGET.findall(text):
            if quoted or plain in targets():  # "make" at the start of a line may be English
                name = quoted or plain
                by_name.setdefault(f"make {name}", []).append(["make", name])
    return by_name


def test_every_command_is_run_or_has_a_reason():
    names = set(found()) | {f"make {target}" for target in targets() - {"clean"}}
    assert names - RUN.keys() - NOT_RUN.keys() == set(), "no test runs them"
    stages = {name for name in RUN if name.startswith(("opd-train", "python -m opd_trainer"))}
    assert (RUN.keys() | NOT_RUN.keys()) - stages - names == set(), "nobody names them"
    assert missing_tests(" ".join(RUN.values())) == []


def test_commands_are_found():
    text = "run `python -m benchmarks filter --prompts 2`, or `make test`.\n(make docs)\n"
    text += (
        "$(BIN)/python -m opd_trainer distill \\\n   recipes/x.yaml  # a comment\nmake the most\n"
    )
    assert commands_in(text) == [
        ["python", "-m", "benchmarks", "filter", "--prompts", "2"],
        ["python", "-m", "opd_trainer", "distill", "recipes/x.yaml"],
    ]
    assert _TARGET.findall(text) == [("test", ""), ("docs", ""), ("", "the")]
    assert name_of(commands_in(text)[0]) == "python -m benchmarks filter"


def documented(*programs: str) -> list[list[str]]:
    return [words for name, all_of in sorted(found().items()) for words in all_of
            if name.startswith(programs)]  # fmt: skip


def test_the_benchmarks_take_the_arguments(monkeypatch):
    """Every `python -m benchmarks ...` as it is written, without its work."""
    taken = []
    for module in (benchmarks.compare, benchmarks.trainer_step, benchmarks.chunks,
                   benchmarks.gradient_filter, benchmarks.audit, benchmarks.roofline,
                   benchmarks.tune, benchmarks.backends, benchmarks.gpu):  # fmt: skip
        monkeypatch.setattr(module, "main", lambda arguments: taken.append(arguments))
    lines = documented("python -m benchmarks ")
    for words in lines:
        monkeypatch.setattr("sys.argv", words[2:])
        benchmarks.main()
    assert len(taken) == len(lines) > 10


def test_the_memory_of_a_loss_is_printed(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 576, "vocab_size": 49152}')
    for words in documented("python -m opd_kernels.memory"):
        monkeypatch.setattr("sys.argv", [str(tmp_path) if x == "DIR" else x for x in words[2:]])
        if len(words) > 3:
            memory.main()
            assert "one_pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", sorted({" ".join(words) for words in documented("python -m opd_trainer", "opd-train")})
)
def test_the_trainer_takes_the_arguments(line):
    """Every recipe and key as it is written."""
    config = pytest.importorskip("opd_trainer.config")
    stages = {"distill": "Distillation", "sft": "SFT", "rlvr": "RLVR", "evaluate": "Evaluation"}
    words = line.removeprefix("python -m opd_trainer ").removeprefix("opd-train ").split()
    if words[0] in ("report", "init") or len(words) == 1:
        return
    if words[1] in ("RECIPE", "runs/x/config.json"):
        words[1] = "recipes/demo.yaml"
    stage = getattr(config, f"{stages[words[0]]}Config")
    overrides = [*words[2:], "--use_cpu", "true"]
    assert config.load_config(stage, ROOT / words[1], overrides).model


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_makefile_has_the_targets():
    names = [words[1] for words in documented("make ")]
    assert set(names) <= targets()
    done = subprocess.run(
        ["make", "--dry-run", *sorted(set(names) - {"clean"})], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_the_chart_is_drawn(tmp_path):
    for name in ("peers.py", "performance.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    runpy.run_path(str(tmp_path / "peers.py"), run_name="__main__")
    assert (tmp_path / "peers.svg").read_bytes() == (ROOT / "docs" / "peers.svg").read_bytes()


def test_the_epilogues_are_timed():
    """The command of `make bench`, for one epilogue on one backend."""
    pytest.importorskip("pytest_benchmark", reason="pip install 'opd-kernels[bench]'")
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"python -m (pytest benchmarks .*)$", makefile, re.MULTILINE)
    assert command is not None
    words = ["-p", "no:cacheprovider", "-k", "test_gather and torch"]
    # In a worker of pytest-xdist, pytest-benchmark would time nothing.
    variables = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command[1]), *words], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=variables | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_gather[torch]" in done.stdout


def test_the_keys_in_the_text_exist():
    """`key: value` and `--key value` in the text are of a recipe."""
    config = pytest.importorskip("opd_trainer.config")
    stages = ("DistillationConfig", "SFTConfig", "RLVRConfig", "EvaluationConfig", "TeacherConfig")
    keys = {key for stage in stages for key in vars(getattr(config, stage))["__dataclass_fields__"]}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    used = set(re.findall(r"`([a-z_]+): [^`]*`|`--([a-z]+_[a-z_]+) ", text))
    names = {a or b for a, b in used}
    assert len(names) > 5
    assert names - keys == set()

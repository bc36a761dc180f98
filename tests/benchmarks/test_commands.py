"""Every command of `python -m benchmarks` starts; those that no other test runs do a tiny run."""

import re

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.paper.__main__ import main as paper
from tests.tiny_run import write_recipe

COMMANDS = {
    "compare", "trainer_step", "chunks", "filter", "audit", "roofline", "tune", "backends", "gpu",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process and return the cells of the table that it prints."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, arguments)])
        main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def test_help_describes_every_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    described = re.findall(r"^    (\w+)\s+\w+", capsys.readouterr().out, flags=re.M)
    assert sorted(described) == sorted(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_has_options(monkeypatch, capsys, command):
    monkeypatch.setattr("sys.argv", ["benchmarks", command, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.count("\n  --") >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure on the GPU")
@pytest.mark.parametrize("command", ["tune", "backends", "gpu"])
def test_a_command_for_gpus_says_that_there_is_none(run, command):
    with pytest.raises(SystemExit, match=f"{command}: it measures on a GPU, and PyTorch sees none"):
        run(command)


def test_chunks_compares_the_orders(run):
    header, first, second = run(
        "chunks", "--tokens", 8, "--dim", 16, "--vocab", 40_000, "--rounds", 1, "--one-pass", 1,
        "--recompute", 1,
    )  # fmt: skip
    assert header == ["order", "chunk", "seconds", "ratio"]
    assert (first[0], first[3], second[0]) == ("one_pass", "1.00", "recompute")
    assert re.fullmatch(r"1 MiB, [1-8] rows", first[1])
    columns = int(re.fullmatch(r"1 MiB, (\d+) columns", second[1])[1])
    assert 1000 < columns < 40_000


def test_the_filter_loses_less_with_a_smaller_threshold(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    header, coarse, exact = run("filter", "--recipe", recipe, "--prompts", 2, "--exponents", 5, 40)
    assert header[:3] == ["eps", "entries per token", "dropped probability"]
    assert (coarse[0], exact[0]) == ("2^-5", "2^-40")
    assert int(coarse[1]) < int(exact[1]) == 97
    dropped, *errors = (float(cell.rstrip("%")) for cell in coarse[2:])
    assert 0 < dropped < 100
    assert len(errors) == 4
    assert all(0 < error < 100 for error in errors)
    assert exact[2:] == ["0.00%"] * 5


def test_the_paper_has_five_claims(capsys):
    with pytest.raises(SystemExit) as end:
        paper(["--help"])
    assert end.value.code == 0
    assert "{1,2,3,4,5}" in capsys.readouterr().out

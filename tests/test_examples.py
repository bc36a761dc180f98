"""Every script of examples/ learns, without arguments and with models from folders."""

import json
import re
import runpy
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import distillation_loss, forward_kl
from opd_trainer.models.load import load_model
from tests.reference import make_logits
from tests.tiny_run import write_model
from tests.trainer.test_server import KEY, FakeServer

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
TEXT = "The sea is wide and the ship is small. " * 8
# Arguments of the scripts that load models; words in capitals are replaced by paths of `folders`.
ON_FILES = {
    "cross_entropy": ["--model", "STUDENT", "--text", "TEXT"],
    "self_distillation": ["--model", "STUDENT", "--steps", "8", "--length", "4"],
    "served_teacher": ["--url", "SERVER", "--student", "STUDENT", "--text", TEXT[:200]],
    "training_loop": ["STUDENT", "TEACHER", "TEXT"],
    "transformers_trainer": ["--student", "STUDENT", "--teacher", "TEACHER", "--data", "DATA"],
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process; returns its output and its losses in order."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OPD_TEACHER_API_KEY", KEY)

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        text = capsys.readouterr().out
        return text, [float(x) for x in re.findall(r"\bloss'?:? '?(-?\d+\.\d+)", text)]

    return run


@pytest.fixture
def folders(tmp_path):
    """Return the paths, and the URL, of the words in capitals of ON_FILES."""
    paths = {word: tmp_path / word for word in ("STUDENT", "TEACHER", "TEXT", "DATA")}
    write_model(paths["STUDENT"], seed=0)
    write_model(paths["TEACHER"], seed=1)
    paths["TEXT"].write_text(TEXT)
    paths["DATA"] = tmp_path / "data.jsonl"
    paths["DATA"].write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(16)))
    server = FakeServer(load_model(str(paths["TEACHER"]), "float32"))
    yield {word: str(path) for word, path in paths.items()} | {"SERVER": server.url}
    server.server.shutdown()
    server.server.server_close()


def assert_learned(losses):
    """Compare the last five losses with the first five, since sampled losses are noisy."""
    assert len(losses) >= 8
    assert fmean(losses[-5:]) < 0.97 * fmean(losses[:5])


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_learns(run, name):
    assert_learned(run(name)[1])


@pytest.mark.parametrize("name", ON_FILES)
def test_an_example_learns_with_models_from_folders(run, folders, name):
    assert_learned(run(name, *[folders.get(word, word) for word in ON_FILES[name]])[1])


def test_both_ways_to_the_cross_entropy_give_that_of_the_logits(run):
    _, losses = run("cross_entropy")
    with_logits, by_log_prob, patched = losses[:3]
    assert by_log_prob == pytest.approx(with_logits, abs=3e-6)
    assert patched == pytest.approx(with_logits, abs=3e-6)


def test_the_loop_sees_a_part_of_the_full_divergence(run, monkeypatch):
    """At the first step the models are the same, and the bucket hides a part of the loss."""
    _, student = run("training_loop")
    monkeypatch.setattr("opd_kernels.distillation_loss", partial(distillation_loss, support="full"))
    _, full = run("training_loop")
    assert 0.5 * full[0] < student[0] < full[0]


def test_the_custom_objective_lies_between_its_closed_forms():
    """With skew 0 it is the forward KL with a bucket, with skew 1 it is 0; 0.1 is between them."""
    skewed = runpy.run_path(str(FOLDER / "custom_objective.py"))["skewed_kl"]
    student, teacher = make_logits(), make_logits(requires_grad=False)

    def loss(objective, **options):
        return distillation_loss(student, teacher, k=6, objective=objective, **options).per_token

    plain = loss(partial(forward_kl, tail="bucket"))
    assert_close(loss(partial(skewed, skew=0.0)), plain, rtol=1e-10, atol=1e-12)
    assert_close(loss(partial(skewed, skew=1.0)), torch.zeros_like(plain), rtol=0, atol=1e-12)
    some = loss(partial(skewed, skew=0.1), support="union")
    assert (some > 0).all()
    assert (some < loss(partial(forward_kl, tail="bucket"), support="union")).all()
    assert (some <= -torch.tensor(0.1).log()).all()

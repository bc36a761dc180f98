"""The trainer on several ranks, with whole models (DDP) and with models that are split."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from torch.testing import assert_close

from opd_kernels.parallel import plain
from tests.ranks import run_ranks
from tests.tiny_run import read_metrics, write_model, write_recipe
from tests.trainer_steps import completions, gradient_of
from trainer.__main__ import prepare, train
from trainer.config import DistillationConfig, load_config
from trainer.models import load_model

FSDP, TP = {"fsdp_size": 2}, {"tp_size": 2}
LAYOUTS = {"ddp": (None, 2), "fsdp": (FSDP, 2), "tp": (TP, 2), "both": (FSDP | TP, 4)}


def _recipe(folder, split, **changes):
    """A recipe of the model that all share, in a folder of its own."""
    teacher = {"teacher": f"{folder.parent}/teacher", "privileged_context": None}
    shared = {"model": f"{folder.parent}/model", "distributed_config": split, **teacher}
    return write_recipe(folder, **shared | changes)


def _prepare(folder, split, **changes):
    # accelerate refuses tensor parallelism on CPUs, where PyTorch has it.
    ParallelismConfig._validate_accelerator = lambda *_: None
    return prepare(load_config(DistillationConfig, _recipe(folder, split, **changes), []))


def _wrapped(trainer):
    if trainer.is_distributed_loading_by_transformers:
        return trainer.model
    return trainer.accelerator.prepare(trainer.model)


def _step_worker(rank, folder, split, ranks):
    trainer = _prepare(Path(folder, f"step{rank}"), split)[0]
    batch = completions()
    # Of three and one micro-batches, where ranks have completions of their own.
    share = [batch[:5], batch[5:]][rank // 2 if ranks == 4 else rank]
    loss = trainer.learn(_wrapped(trainer), batch if split == TP else share)
    gradients = {n: plain(p.grad, whole=True) for n, p in trainer.model.named_parameters()}
    torch.save((trainer.accelerator.reduce(loss, "mean"), gradients), f"{folder}/{rank}.pt")


@pytest.fixture
def models(tmp_path):
    write_model(tmp_path / "model")
    write_model(tmp_path / "teacher", seed=1)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_rank(models, layout):
    split, ranks = LAYOUTS[layout]
    trainer = _prepare(models / "one", None)[0]
    expected_loss, expected, _ = gradient_of(trainer, completions())
    run_ranks(_step_worker, models, split, ranks, ranks=ranks)
    for rank in range(ranks):
        loss, gradients = torch.load(models / f"{rank}.pt")
        assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def _run_worker(rank, folder, split, changes):
    train(*_prepare(Path(folder), split, **changes))


def _trained(models, split, ranks, **changes):
    folder = models / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run_ranks(_run_worker, folder, split, changes, ranks=ranks)
    weights = load_model(f"{folder}/run/model", "float32").state_dict()
    return weights, read_metrics(folder / "run")


@pytest.mark.parametrize(("layout", "same_as"), [("fsdp", 2), ("tp", 1), ("both", 2)])
def test_a_run_is_that_of_as_many_replicas(models, layout, same_as):
    """Rollouts, held-out figures and the saved student, which one process can load."""
    changes = {"max_steps": 3, "teacher_update_rate": 0.0, "micro_batch_tokens": 40}
    expected, (steps, lines) = _trained(models, None, same_as, **changes)
    split, ranks = LAYOUTS[layout]
    actual, (own_steps, own_lines) = _trained(models, split, ranks, **changes)
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close(actual[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert len(own_lines) == len(lines)
    for ours, theirs in zip(own_steps, steps, strict=True):
        for name in ("loss", "grad_norm", "student_mass", "completion_length", "overlap"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert own_lines[0]["eval_reverse_kl"] == pytest.approx(lines[0]["eval_reverse_kl"], rel=1e-4)

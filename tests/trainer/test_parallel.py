"""The trainer on several ranks, with whole models (DDP) and with split models."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.testing import assert_close

from opd_kernels.parallel import plain
from opd_trainer.__main__ import train
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.models.load import load_model
from tests.ranks import run_ranks
from tests.tiny_run import read_metrics, write_model, write_recipe
from tests.trainer_steps import assert_same_gradients, completions, gradient_of

FSDP, TP = {"fsdp_size": 2}, {"tp_size": 2}
HSDP = {"fsdp_size": 2, "dp_replicate_size": 2}
# How models are split, the number of ranks, and how many of six completions each replica has.
LAYOUTS = {
    "ddp": (None, 2, [5, 1]),
    "fsdp": (FSDP, 2, [5, 1]),
    "hsdp": (HSDP, 4, [3, 1, 1, 1]),
    "tp": (TP, 2, [6]),
    "both": (FSDP | TP, 4, [5, 1]),
}
MOVING = {"teacher": "self", "privileged_context": "be brief", "teacher_update_rate": 0.3}
RUNS = {
    "another teacher": {},
    "a moving teacher": MOVING | {"eval_strategy": "steps", "eval_steps": 1},
    "the current student": MOVING | {"teacher_update_rate": 1.0},
    "adapters": {"lora_r": 2},
    "bf16": {"bf16": True, "support": "full", "tail": None, "gradient_checkpointing": True},
}


def _config(folder, split, **changes):
    """Return the config of all ranks; one rank writes the recipe, so that none reads a part."""
    path, first = folder / "recipe.yaml", not dist.is_initialized() or dist.get_rank() == 0
    if first:
        teacher = {"teacher": f"{folder.parent}/teacher", "privileged_context": None}
        shared = {"model": f"{folder.parent}/model", "distributed_config": split, **teacher}
        write_recipe(folder, **shared | changes)
    if dist.is_initialized():
        dist.barrier()
    return load_config(DistillationConfig, path, [])


def _allow_tensor_parallelism():
    """Let accelerate use tensor parallelism on CPUs: it refuses, although PyTorch supports it."""
    ParallelismConfig._validate_accelerator = lambda *_: None


@pytest.fixture
def models(tmp_path):
    write_model(tmp_path / "model")
    write_model(tmp_path / "teacher", seed=1)
    return tmp_path


def _step_worker(rank, folder, layout):
    _allow_tensor_parallelism()
    split, ranks, counts = LAYOUTS[layout]
    trainer = prepare(_config(Path(folder, "step"), split))[0]
    model = trainer.model if split else trainer.accelerator.prepare(trainer.model)
    replica = rank * len(counts) // ranks
    first = sum(counts[:replica])
    loss = trainer.learn(model, completions()[first : first + counts[replica]])
    gradients = {n: plain(p.grad, whole=True) for n, p in trainer.model.named_parameters()}
    torch.save((trainer.accelerator.reduce(loss, "mean"), gradients), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_rank(models, layout):
    ranks = LAYOUTS[layout][1]
    trainer = prepare(_config(models / "one", None))[0]
    expected_loss, expected, _ = gradient_of(trainer, completions())
    run_ranks(_step_worker, models, layout, ranks=ranks)
    for rank in range(ranks):
        loss, gradients = torch.load(models / f"{rank}.pt")
        assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients, expected)


def _adapters_worker(rank, folder):
    trainer = prepare(_config(Path(folder, "step"), FSDP, lora_r=2))[0]
    trainer._sync_replicated_trainable_parameters(trainer.model)  # as train() does
    trainer.learn(trainer.model, [completions()[:5], completions()[5:]][rank])
    named = trainer.model.named_parameters()
    learned = {n: (p.detach(), p.grad) for n, p in named if p.requires_grad}
    torch.save(learned, f"{folder}/{rank}.pt")


def test_adapters_on_a_split_model_learn_what_one_rank_does(models):
    """With three micro-batches and one: both ranks must gather the base's weights as often."""
    run_ranks(_adapters_worker, models)
    ranks = [torch.load(models / f"{rank}.pt") for rank in range(2)]
    trainer = prepare(_config(models / "one", None, lora_r=2))[0]
    parameters = dict(trainer.model.named_parameters())
    for name, (value, _) in ranks[0].items():
        parameters[name].data.copy_(value)
    _, expected, _ = gradient_of(trainer, completions())
    for learned in ranks:
        assert_same_gradients({n: gradient for n, (_, gradient) in learned.items()}, expected)


def _run(folder, split, **changes):
    changes = {"max_steps": 3, "micro_batch_tokens": 40} | changes
    train(*prepare(_config(folder, split, **changes)))


def _assert_same_run(folder, expected):
    """Compare the saved students, which a single process can load, and the logs."""
    folders = (folder, expected)
    ours, theirs = (load_model(f"{x}/run/model", "float32").state_dict() for x in folders)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=2e-5, msg=f"{folder} {name}")
    (steps, lines), (their_steps, their_lines) = (read_metrics(x / "run") for x in folders)
    assert len(lines) == len(their_lines)
    names = ("loss", "grad_norm", "student_mass", "completion_length", "overlap")
    for step, other in zip(steps, their_steps, strict=True):
        assert [step[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-3)
    metrics = [
        [x["eval_reverse_kl"] for x in y if "eval_reverse_kl" in x] for y in (lines, their_lines)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def _fsdp_worker(rank, folder):
    for name, changes in RUNS.items():
        _run(Path(folder, f"{name}, DDP"), None, **changes)
        _run(Path(folder, f"{name}, FSDP2"), FSDP, **changes)


def test_runs_under_fsdp2_are_those_under_ddp(models):
    run_ranks(_fsdp_worker, models)
    for name in RUNS:
        _assert_same_run(models / f"{name}, FSDP2", models / f"{name}, DDP")


def _tp_worker(rank, folder, split, name, changes):
    _allow_tensor_parallelism()
    _run(Path(folder, name), split, **changes)


def test_a_run_under_tensor_parallelism_is_that_of_one_rank(models):
    _run(models / "one", None)
    run_ranks(_tp_worker, models, TP, "two", {})
    _assert_same_run(models / "two", models / "one")


def test_a_run_under_both_is_that_of_as_many_replicas(models):
    short = {"max_steps": 2, "eval_data": None, "scorer": None, "preflight": False}
    run_ranks(_tp_worker, models, None, "two", short)
    run_ranks(_tp_worker, models, FSDP | TP, "four", short, ranks=4)
    _assert_same_run(models / "four", models / "two")


def _accelerate_worker(rank, folder):
    """Run with accelerate's FSDP2; it requires GPUs, so the CPU is declared as one."""
    saves = {"save_strategy": "steps", "save_steps": 2, **MOVING}
    _run(Path(folder, "DDP"), None, **saves)
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }  # fmt: skip
    for resume in (None, "auto"):
        changes = {"max_steps": 3, "micro_batch_tokens": 40, **saves}
        config = _config(Path(folder, "FSDP2"), None, resume_from_checkpoint=resume, **changes)
        AcceleratorState._reset_state()
        assert config.device.type == "cpu"  # creates the state that is patched below
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer, checkpoint = prepare(config)
        train(trainer, checkpoint)
        assert trainer.accelerator.is_fsdp2
        dist.barrier()
        if rank == 0 and resume is None:
            shutil.copytree(f"{folder}/FSDP2", f"{folder}/at once")
            shutil.rmtree(f"{folder}/FSDP2/run/checkpoint-3")
        dist.barrier()


def test_runs_under_accelerates_fsdp2_are_those_under_ddp_and_resume(models):
    run_ranks(_accelerate_worker, models)
    _assert_same_run(models / "at once", models / "DDP")
    _assert_same_run(models / "FSDP2", models / "DDP")
    assert (models / "FSDP2/run/checkpoint-3").exists()

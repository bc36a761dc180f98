"""Every recipe runs on a tiny model, and on its own model in `make test-slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd_trainer.__main__ import main
from opd_trainer.command.keys import STAGES
from opd_trainer.config import load_config, stages
from tests.tiny_run import write_model

RECIPES = {"demo": "distill", "sft": "sft", "rlvr": "rlvr", "evaluate": "evaluate"}
SPLIT = {"large": "distill"}  # over several ranks


def test_every_recipe_is_here():
    assert {path.stem for path in Path("recipes").glob("*.yaml")} == (RECIPES | SPLIT).keys()


def _overrides(folder, model, **changes):
    arguments = {"model": model, "output_dir": str(folder / "run"), "max_completion_length": "4",
                 "use_cpu": "true", "report_to": "none", "disable_tqdm": "true"}  # fmt: skip
    return [x for key, value in (arguments | changes).items() for x in (f"--{key}", value)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_a_tiny_model(tmp_path, name):
    """With the recipe's data, scorer and objective, and shorter completions."""
    model = str(write_model(tmp_path / "model", max_position_embeddings=2048))
    stage = RECIPES[name]
    changes = {"max_steps": "2", "per_device_train_batch_size": "2"}
    if stage == "evaluate":
        changes = {"teacher": model}
    main([stage, f"recipes/{name}.yaml", *_overrides(tmp_path, model, **changes)])
    run = tmp_path / "run"
    if stage == "evaluate":
        assert json.loads((run / "metrics.jsonl").read_text())["eval_reverse_kl"] > 0
        return
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2]
    assert [x["step"] for x in lines if "eval_score" in x] == [0, 2]
    assert (run / "model" / "model.safetensors").exists()
    main(["report", str(run), "--output", str(tmp_path / "report.html")])
    assert "<html" in (tmp_path / "report.html").read_text()[:500]


@pytest.mark.parametrize("name", SPLIT)
def test_a_recipe_of_several_ranks_runs_by_torchrun(tmp_path, name):
    """Models are split over two ranks; the saved student is whole."""
    model = str(write_model(tmp_path / "model", max_position_embeddings=4096))
    changes = {"teacher": model, "distributed_config": "{fsdp_size: 2}", "max_steps": "2",
               "save_steps": "1", "per_device_train_batch_size": "2",
               "eval_data": "reasoning_gym:gsm_symbolic?size=2&seed=2"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "opd_trainer", SPLIT[name], f"recipes/{name}.yaml"]  # fmt: skip
    command += _overrides(tmp_path, model, **changes)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    run = tmp_path / "run"
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2]
    before, after = (load_file(x / "model/model.safetensors") for x in (tmp_path, run))
    assert before.keys() == after.keys()
    assert all(before[x].shape == after[x].shape for x in before)
    assert not before["lm_head.weight"].equal(after["lm_head.weight"])
    assert (run / "checkpoint-1/model.safetensors").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_its_stage_knows(name):
    load_config(
        getattr(stages, STAGES[RECIPES[name]]), Path(f"recipes/{name}.yaml"), ["--use_cpu", "true"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "better"),
    [("sft", "eval_reverse_kl"), ("rlvr", "eval_score"), ("evaluate", "eval_reverse_kl")],
)
def test_a_recipe_on_smollm2(tmp_path, name, better):
    """SFT approaches the teacher, the reward rises, and the evaluation is of the student."""
    run = tmp_path / "run"
    main([RECIPES[name], f"recipes/{name}.yaml", "--output_dir", str(run)])
    if name == "evaluate":
        metrics = json.loads((run / "metrics.jsonl").read_text())
        # The student is the teacher without the context.
        assert metrics["eval_reverse_kl"] == pytest.approx(metrics["eval_context_kl"], rel=1e-3)
        assert metrics["eval_teacher_score"] > 0.5 > metrics["eval_score"]
        return
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [x[better] for x in lines if better in x]
    assert last < 0.8 * first if better == "eval_reverse_kl" else last > first

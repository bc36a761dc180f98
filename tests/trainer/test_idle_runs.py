"""Runs that would learn nothing are refused, or raise an alarm in their first lines."""

from pathlib import Path

import pytest

from opd_trainer.config import RLVRConfig, SFTConfig, load_config
from opd_trainer.errors import RunStoppedError
from opd_trainer.measures.diagnostics import alarms
from tests.tiny_run import NO_TEACHER, make_trainer, read_metrics, write_recipe

OFF = {"eval_on_start": False, "preflight": False}
STEP = {"loss": 0.0, "skipped_steps": 0.0, "grad_norm": 1.0, "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate: input should be greater than 0, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: input should be greater than 0, got 0.0"),
        ({"max_steps": 0}, "max_steps: .*, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: input should be greater than 0, got 0"),
        (
            {"per_device_train_batch_size": 13, "dataloader_drop_last": True},
            "per_device_train_batch_size: expected at most the 12 prompts with "
            "dataloader_drop_last, got 13; there would be no step",
        ),
        (
            {"per_device_train_batch_size": 13, "steps_per_rollout": 2},
            "expected at most the 12 prompts with steps_per_rollout above 1, got 13",
        ),
        ({"sft_coef": 1.0}, "row 1, completion: missing; sft_coef: expected a completion in every"),
        ({"eval_strategy": "steps", "eval_data": None}, "eval_strategy: expected eval_data with"),
    ],
)
def test_what_is_known_before_the_run_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes, preflight=False)


def test_a_model_without_gradients_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, **OFF)
    trainer.model.requires_grad_(False)
    with pytest.raises(RunStoppedError, match="model: expected parameters that need a gradient"):
        trainer.train()


def _alarms(trainer):
    trainer.train()
    steps, _ = read_metrics(Path(trainer.args.output_dir))
    return [line.get("alarm", "") for line in steps]


def test_equal_rewards(tmp_path):
    (tmp_path / "reward.py").write_text("def same(text, row):\n    return 1.0\n")
    changes = {"scorer": f"{tmp_path}/reward.py:same", "completions_per_prompt": 2}
    raised = _alarms(make_trainer(tmp_path, RLVRConfig, **NO_TEACHER | changes, **OFF))
    assert raised[0].startswith("Rewards: all completions of each prompt had the same reward, so")
    assert not any(raised[1:])
    changes |= {"scorer": f"{tmp_path}/scorer.py:length", "kl_coef": 0.1}
    (tmp_path / "scorer.py").write_text("def length(text, row):\n    return hash(text) % 97\n")
    assert not any(_alarms(make_trainer(tmp_path, RLVRConfig, **NO_TEACHER | changes, **OFF)))


def test_only_truncated_completions(tmp_path):
    trainer = make_trainer(tmp_path, skip_truncated=True, max_completion_length=1, **OFF)
    trainer.sampler.eos_ids = set()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    raised = _alarms(trainer)
    assert raised[0].startswith("Skipped: every completion reached max_completion_length, and")
    assert "No gradient" not in " ".join(raised)
    assert all(p.equal(before[n]) for n, p in trainer.model.named_parameters())


def test_a_loss_without_a_gradient(tmp_path):
    (tmp_path / "zero.py").write_text("def zero(s, t):\n    return 0.0 * s.log_probs.sum(-1)\n")
    changes = {"objective": f"{tmp_path}/zero.py:zero", "tail": None, **OFF}
    raised = _alarms(make_trainer(tmp_path, **changes))
    assert raised[0].startswith("No gradient: it was 0, so nothing is learned")
    assert not any(_alarms(make_trainer(tmp_path, **OFF)))


def test_a_learning_rate_that_stays_0(tmp_path):
    (raised,) = _alarms(make_trainer(tmp_path, max_steps=1, warmup_steps=2, **OFF))
    assert raised.startswith("Learning rate: it was 0 in every step")
    assert not any(_alarms(make_trainer(tmp_path, max_steps=2, warmup_steps=1, **OFF)))


def test_a_scorer_without_held_out_prompts(tmp_path):
    raised = _alarms(make_trainer(tmp_path, eval_data=None, **OFF))
    assert raised[0] == "Scorer: it scores held-out completions, but there are none: set eval_data."
    assert not any(raised[1:])


def test_alarms_wait_for_several_lines_in_a_row(tmp_path):
    """From the first line on, or five times in a row; not where a step was skipped."""
    config = load_config(SFTConfig, write_recipe(tmp_path, **NO_TEACHER), [])
    still = STEP | {"grad_norm": 0.0}
    assert alarms(config, [still]).startswith("No gradient")
    assert not alarms(config, [STEP, *[still] * 4])
    assert alarms(config, [STEP, *[still] * 5]).startswith("No gradient")
    assert "No gradient" not in alarms(config, [still | {"skipped_steps": 1.0}])
    assert not alarms(config, [STEP | {"learning_rate": 0.0}])
    assert alarms(config, [STEP | {"learning_rate": 0.0}], ends=True).startswith("Learning rate")
    assert not alarms(config, [STEP | {"learning_rate": 0.0}, STEP], ends=True)

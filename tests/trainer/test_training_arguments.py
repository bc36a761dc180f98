"""Every key of TrainingArguments has its effect in a run, or is refused in one line."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import TrainerCallback

from opd_trainer.config import DistillationConfig, changed_keys, load_config
from opd_trainer.models.load import load_model
from tests import schedule_free
from tests.tiny_run import make_trainer, read_metrics, write_recipe
from tests.trainer import training_arguments
from tests.trainer.training_arguments import EFFECTS, KEYS, OPTIMISERS, SCHEDULES
from tests.trainer_steps import assert_same_gradients, completions, gradient_of

NO_EVALUATION = {"eval_on_start": False, "preflight": False}


def test_the_page_lists_what_happens_to_each_key():
    text = "run python -m tests.trainer.training_arguments"
    assert training_arguments.PAGE.read_text() == training_arguments.page(), text
    assert EFFECTS.keys() <= {f.name for f in KEYS}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("shared"), **NO_EVALUATION)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_optimiser_takes_a_step_or_is_refused(tmp_path, trainer, name):
    """One that needs a package names it in its error."""
    changes, package = {"optim": name}, training_arguments.needed_package(name)
    if name.startswith(("galore", "apollo")):
        changes["optim_target_modules"] = "all-linear"
    if name.endswith("lomo") or name.endswith("layerwise"):
        with pytest.raises(ValueError, match=f"a step has several micro-batches, got {name}$"):
            load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
        return
    config = load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
    if package is not None and find_spec(package.replace("-", "_")) is None:
        with pytest.raises((ImportError, ValueError), match=f"(?i){package.replace('x_', 'x.?')}"):
            Trainer.get_optimizer_cls_and_kwargs(config, trainer.model)
        return
    student = make_trainer(tmp_path, **changes, max_steps=1, **NO_EVALUATION)
    before = [p.detach().clone() for p in student.model.parameters()]
    student.train()
    pairs = zip(student.model.parameters(), before, strict=True)
    assert not any(torch.equal(p, old) for p, old in pairs)


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if name not in ("reduce_lr_on_plateau", "greedy")]
)
def test_each_schedule_sets_the_learning_rates(tmp_path, trainer, name):
    changes = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name] or None}
    changes |= {"warmup_steps": 2, "learning_rate": 0.5}
    trainer.args = load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer.optimizer = trainer.lr_scheduler = None
    if name == "constant":
        assert rates == [0.5] * 8
    else:
        assert rates[0] < max(rates[:3]) == pytest.approx(0.5)
    if name in ("linear", "cosine", "polynomial", "cosine_with_min_lr"):
        assert rates[3] > rates[5] > rates[7] > 0


@pytest.mark.parametrize("name", INTEGRATION_TO_CALLBACK)
def test_each_tracker_is_called_or_names_its_package(name):
    try:
        assert isinstance(INTEGRATION_TO_CALLBACK[name](), TrainerCallback)
    except (RuntimeError, ImportError, ValueError) as error:
        message = str(error)
    else:
        return
    assert re.search("requires|install", message)


def test_numbers_of_the_optimiser(tmp_path):
    changes = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-3, "weight_decay": 0.125}
    trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
    (decayed, bare) = trainer.create_optimizer().param_groups
    assert (decayed["betas"], decayed["eps"]) == ((0.5, 0.75), 1e-3)
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.125, 0)
    assert decayed["lr"] == trainer.args.learning_rate
    trainer = make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.5", **NO_EVALUATION)
    assert trainer.create_optimizer().param_groups[0]["momentum"] == 0.5


def test_ddp_options_reach_ddp(tmp_path):
    changes = {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 7}
    changes |= {"ddp_broadcast_buffers": False, "ddp_static_graph": True}
    handler = make_trainer(tmp_path, **changes, **NO_EVALUATION).accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb) == (False, 7)
    assert (handler.broadcast_buffers, handler.static_graph) == (False, True)


def _order(trainer):
    return [[p.text for p in batch] for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_order_of_prompts(tmp_path, steps):
    """With reused completions too, where each batch comes several times in a row."""
    write_recipe(tmp_path)
    texts = ["x" * (1 + 7 * n % 48) for n in range(48)]
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "{x}"}}\n' for x in texts))

    def order(**changes):
        changes |= {"steps_per_rollout": steps}
        return _order(make_trainer(tmp_path, **changes, **NO_EVALUATION))[::steps]

    def spread(batches):
        return sum(max(map(len, x)) - min(map(len, x)) for x in batches) / 12

    in_order = [texts[first : first + 4] for first in range(0, 48, 4)]
    assert order(train_sampling_strategy="sequential") == in_order
    assert order(seed=1, data_seed=3) == order(seed=2, data_seed=3) != order(seed=1, data_seed=4)
    assert order(seed=3) == order(seed=1, data_seed=3)
    grouped = order(train_sampling_strategy="group_by_length", seed=5)
    assert sorted(x for batch in grouped for x in batch) == sorted(texts)
    assert len(grouped[0][0]) == 48  # the longest first, to run out of memory early
    assert spread(grouped) < 0.5 * spread(order(seed=5))
    with pytest.raises(ValueError, match=r"^train_sampling_strategy: .*, got 'batch_rebalance'$"):
        order(train_sampling_strategy="batch_rebalance")


def test_an_incomplete_batch(tmp_path):
    sizes = []
    for drops in (False, True):
        changes = {"dataloader_drop_last": drops, "per_device_train_batch_size": 5}
        sizes.append([len(x) for x in _order(make_trainer(tmp_path, **changes, **NO_EVALUATION))])
    assert sizes == [[5, 5, 2], [5, 5]]


def test_workers_collate_the_same_prompts(tmp_path):
    changes = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    changes |= {"dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork"}
    plain = _order(make_trainer(tmp_path, **NO_EVALUATION))
    trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
    assert _order(trainer) == plain
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (2, 3)


@pytest.mark.parametrize("count", ["all", "non_padding"])
def test_tokens_and_operations_are_counted(tmp_path, count):
    """Prompts and completions of all micro-batches of two, as the model sees them."""
    changes = {"include_num_input_tokens_seen": count, "max_steps": 2, "logging_steps": 1}
    trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
    batches = iter([completions(4), completions(6)])
    trainer.complete = lambda prompts: next(batches)
    trainer.train()
    steps, lines = read_metrics(Path(trainer.args.output_dir))
    # Prompts have 3, 4, 5, ... tokens, completions 2, 4, 6, 8, 3, 5.
    tokens = [5 + 8 + 11 + 14, 2 * (5 + 8 + 11 + 14) + 10 + 13]
    padded = [2 * 14 + 2 * 8, 2 * 14 + 2 * 8 + 2 * 14 + 2 * 11 + 2 * 8]
    seen = [line["num_input_tokens_seen"] for line in steps]
    assert seen == (tokens if count == "non_padding" else padded)
    size = trainer.model.num_parameters(exclude_embeddings=True)
    assert lines[-1]["total_flos"] == 6 * padded[1] * size


def test_the_cache_is_emptied(tmp_path, monkeypatch):
    """In each of the two micro-batches of steps 0 and 3."""
    trainer = make_trainer(tmp_path, torch_empty_cache_steps=3, **NO_EVALUATION)
    steps = []
    monkeypatch.setattr(
        "transformers.trainer.clear_device_cache", lambda: steps.append(trainer.state.global_step)
    )
    trainer.train()
    assert steps == [0, 0, 3, 3]


def test_noise_on_embeddings_changes_losses_but_no_sample(tmp_path):
    samples, losses = [], []
    for alpha in (None, 5.0):
        changes = {"max_steps": 1, "neftune_noise_alpha": alpha}
        trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
        trainer.train()
        samples.append([c.ids for c in trainer.rollout])
        losses.append(read_metrics(Path(trainer.args.output_dir))[0][0]["loss"])
    assert samples[0] == samples[1]
    assert abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_reentrant": True}, {"use_reentrant": False}, {"every_n_layers": 2}],
    ids=str,
)
def test_checkpointing_changes_no_gradient(tmp_path, lora_r, options):
    changes = {"activation_checkpointing": True, "activation_checkpointing_kwargs": options or None}
    changes |= {"lora_r": lora_r, "max_steps": 1}
    trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
    if lora_r:
        with torch.no_grad():  # adapters begin as zero, with no gradient for lora_A
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
    expected = gradient_of(trainer, completions())
    trainer.args.learning_rate = 1e-30  # train() turns checkpointing on
    trainer.train()
    assert trainer.model.is_activation_checkpointing
    assert_same_gradients(gradient_of(trainer, completions())[1], expected[1])


def test_a_schedule_free_optimiser(tmp_path, monkeypatch):
    """Training samples from the weights of its gradients; evaluation and files have the average."""
    schedule_free.install(monkeypatch)
    changes = {"optim": "schedule_free_sgd", "save_strategy": "steps", "save_steps": 2}
    changes |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 4}
    trainer = make_trainer(tmp_path, **changes, eval_strategy="steps", eval_steps=2)
    seen, sample = [], trainer.sampler.sample

    def spy(model, prompts, *seed, **options):
        mode = trainer.optimizer and trainer.optimizer.param_groups[0]["train_mode"]
        seen.append((len(seed) == 3 and not options, mode))
        return sample(model, prompts, *seed, **options)

    trainer.sampler.sample = spy
    trainer.train()
    assert {mode for is_training, mode in seen if is_training} == {True}
    assert {mode for is_training, mode in seen if not is_training} == {False}
    student = load_model(str(trainer.save_student()), "float32")
    names = {p: n for n, p in trainer.model.named_parameters()}
    state = trainer.optimizer.optimizer.state
    trainer.optimizer.train()
    assert len(state) == len(names)
    for p, name in names.items():
        y, z = p.detach(), state[p]["z"]
        assert_close(student.get_parameter(name), y.lerp(z, 1 - 1 / 0.9), rtol=1e-5, atol=1e-6)
        assert not torch.equal(student.get_parameter(name), y)
    resumed = load_config(
        DistillationConfig,
        write_recipe(tmp_path, **changes, eval_strategy="steps", eval_steps=2),
        ["--resume_from_checkpoint", "auto"],
    )
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "model"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    from opd_trainer.build import prepare

    again, checkpoint = prepare(resumed)
    assert checkpoint.endswith("checkpoint-2")
    again.train(resume_from_checkpoint=checkpoint)
    again.optimizer.train()
    for p, q in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=0)


def test_the_strategies_of_logs_evaluations_and_checkpoints(tmp_path):
    changes = {"max_steps": 6, "logging_steps": 4, "logging_first_step": True}  # 3 steps an epoch
    changes |= {"eval_strategy": "epoch", "eval_delay": 2, "save_strategy": "steps"}
    changes |= {"save_steps": 2, "save_total_limit": 2, "skip_memory_metrics": False}
    trainer = make_trainer(tmp_path, **changes, preflight=False)
    trainer.train()
    run = Path(trainer.args.output_dir)
    steps, lines = read_metrics(run)
    assert [line["step"] for line in steps] == [1, 4]
    assert [line["step"] for line in lines if "eval_truncated" in line] == [0, 6]
    assert sorted(x.name for x in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert "train_mem_cpu_alloc_delta" in lines[-1]
    trainer = make_trainer(tmp_path, logging_strategy="no", **NO_EVALUATION)
    trainer.train()
    assert read_metrics(run)[0] == []


def test_determinism_and_the_debugger(tmp_path):
    changes = {"full_determinism": True, "debug": "underflow_overflow", "max_steps": 1}
    trainer = make_trainer(tmp_path, **changes, **NO_EVALUATION)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    head = trainer.model.lm_head
    with torch.no_grad():
        head.weight[0] = torch.inf
    trainer.sampler.sample = lambda model, prompts, *seed: completions(4)
    with pytest.raises(ValueError, match="DebugUnderflowOverflow: inf/nan detected"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim_args": "a=1"},
            "optim_args: expected none with optim: adamw_torch_fused, got 'a=1'",
        ),
        (
            {"optim": "sgd", "optim_args": "momentun=0.5"},
            "optim_args: expected momentum or dampening or weight_decay or nesterov with",
        ),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules: only galore and apollo"),
        ({"dataloader_persistent_workers": True}, "_workers: expected dataloader_num_workers > 0"),
        ({"dataloader_multiprocessing_context": "fork"}, "expected dataloader_num_workers > 0"),
        ({"eval_steps": 3}, "eval_steps: expected eval_strategy: steps, got 'no'"),
        ({"eval_delay": 3}, "eval_delay: expected eval_strategy: steps or epoch"),
        ({"do_eval": True}, "do_eval: expected eval_strategy: steps or epoch"),
        ({"fp16": True}, "fp16: it needs a GPU; use bf16 on a CPU"),
        (
            {"save_only_model": True, "resume_from_checkpoint": "auto"},
            "resume_from_checkpoint: not possible with save_only_model, whose checkpoints hold no",
        ),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "activation_checkpointing_kwargs: expected activation_checkpointing: true",
        ),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"offload": True},
            },
            "activation_checkpointing_kwargs: offload needs a GPU",
        ),
        ({"average_tokens_across_devices": False}, "not supported; the loss is a mean over the"),
        ({"accelerator_config": {"split_batches": True}}, "not supported; prompts are in memory"),
        ({"local_rank": 0}, "local_rank: not supported; torchrun sets LOCAL_RANK, got 0"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])


def test_the_keys_of_a_finished_config_are_accepted_again(tmp_path):
    """A run writes them, though TrainingArguments derives some of them itself."""
    changes = {"eval_strategy": "steps", "activation_checkpointing": True}
    changes |= {"activation_checkpointing_kwargs": {"use_reentrant": True}, "do_eval": True}
    changes |= {"debug": "underflow_overflow"}
    changes |= {"include_num_input_tokens_seen": True, "optim": "sgd", "optim_args": "momentum=0.5"}
    config = load_config(DistillationConfig, write_recipe(tmp_path, **changes), [])
    written = json.loads(json.dumps(changed_keys(config)))
    written.pop("hub_token", None)
    assert changed_keys(DistillationConfig(**written)) == changed_keys(config)


def test_a_step_calls_transformers_own(tmp_path, monkeypatch):
    """Once per micro-batch, so that what Trainer does beside the loss happens too."""
    trainer = make_trainer(tmp_path, max_steps=2, **NO_EVALUATION)
    calls, step = [], Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda *arguments: calls.append(1) or step(*arguments)
    )
    trainer.train()
    assert len(calls) == 4

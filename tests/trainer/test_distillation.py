"""The distillation step: its invariances, its log, and whole runs of a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from opd_kernels import reverse_kl
from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.__main__ import train
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.data import Prompt
from opd_trainer.models.load import load_model
from opd_trainer.models.rollout import Completion
from tests.ranks import run_ranks
from tests.tiny_run import make_trainer, read_metrics, write_recipe
from tests.trainer_steps import assert_same_gradients, assert_same_step, completions, gradient_of


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_step_does_not_depend_on_how_it_is_batched(tmp_path, aggregation):
    """Nor on the order of samples or the padding for other completions of the batch."""
    trainer = make_trainer(tmp_path, aggregation=aggregation, micro_batch_size=6)
    batch = completions()
    expected = gradient_of(trainer, batch)
    for size in (1, 2, 4):
        trainer.args.micro_batch_size = size
        assert_same_step(gradient_of(trainer, batch), expected)
    assert_same_step(gradient_of(trainer, batch[::-1]), expected)
    trainer.args.micro_batch_size = 100
    for tokens, sizes in ((1, [1] * 6), (45, [2, 3, 1]), (1000, [6])):
        trainer.args.micro_batch_tokens = tokens
        assert_same_step(gradient_of(trainer, batch), expected)
        (part,) = trainer.parts(batch)
        assert [len(x.completions) for x in trainer._micro_batches(part)] == sizes
    long = Prompt("", [7] * 90, [8] * 120)
    padded = gradient_of(trainer, [*batch, Completion(long, [5], truncated=True)])
    alone = gradient_of(trainer, [Completion(long, [5], truncated=True)])
    unit = "tokens" if aggregation == "token" else "completions"
    counts = [sums[unit] for _, _, sums in (expected, alone, padded)]
    for name, gradient in padded[1].items():
        combined = (counts[0] * expected[1][name] + counts[1] * alone[1][name]) / counts[2]
        assert_close(gradient, combined, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_loss_is_that_of_completion_tokens_alone(tmp_path, aggregation):
    """Compared with a loop over single sequences, without padding or batching."""
    trainer = make_trainer(tmp_path, aggregation=aggregation)
    batch = completions()
    loss, gradients, sums = gradient_of(trainer, batch)
    per_completion = []
    for c in batch:
        ours = torch.tensor([c.prompt.student_ids + c.ids])
        theirs = torch.tensor([c.prompt.teacher_ids + c.ids])
        s = lazy_logits(trainer.model, ours)[0, len(c.prompt.student_ids) - 1 : -1].topk(8)
        with torch.no_grad():
            rows = lazy_logits(trainer.teachers[""].model, theirs)[
                0, len(c.prompt.teacher_ids) - 1 : -1
            ]
        per_completion.append(reverse_kl(s, rows.gather(s.ids), tail="bucket"))
    expected = torch.cat(per_completion).mean()
    if aggregation == "sequence":
        expected = torch.stack([x.mean() for x in per_completion]).mean()
    assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)
    assert sums["tokens"] == sum(len(c.ids) for c in batch)
    assert (sums["completions"], sums["truncated"]) == (6, 3)


def _worker(rank, folder, skip_truncated):
    options = {"model": f"{folder}/model", "skip_truncated": skip_truncated}
    trainer = make_trainer(Path(folder, f"rank{rank}"), **options)
    model = trainer.accelerator.prepare(trainer.model)
    loss = trainer.learn(model, _completions_by_rank(skip_truncated)[rank])
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.save((trainer.accelerator.reduce(loss, "mean"), gradients), f"{folder}/rank{rank}.pt")
    trainer.evaluation.measure(trainer.model, step=0)


def _completions_by_rank(skip_truncated):
    """Return each rank's completions: two and four, or all truncated ones on one rank."""
    batch = completions()
    if not skip_truncated:
        return batch[:2], batch[2:]
    return [[c for c in batch if c.truncated == truncated] for truncated in (True, False)]


@pytest.mark.parametrize("skip_truncated", [False, True])
def test_two_ranks_learn_what_one_does(tmp_path, skip_truncated):
    """Even if one rank has nothing to learn from. One rank writes the samples."""
    trainer = make_trainer(tmp_path, skip_truncated=skip_truncated)
    expected_loss, expected, _ = gradient_of(trainer, completions())
    run_ranks(_worker, tmp_path, skip_truncated)
    for rank in range(2):
        loss, gradients = torch.load(tmp_path / f"rank{rank}.pt")
        assert (tmp_path / f"rank{rank}/run/samples/step-0.jsonl").exists() == (rank == 0)
        assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients, expected)


def test_a_run_learns_and_leaves_everything_to_look_at(tmp_path, capsys):
    config = load_config(
        DistillationConfig, write_recipe(tmp_path, max_steps=12, learning_rate=3e-3), []
    )
    train(*prepare(config))
    run = Path(config.output_dir)
    steps, lines = read_metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 13))
    for name in (
        "loss", "grad_norm", "learning_rate", "student_mass", "teacher_mass", "overlap",
        "student_entropy", "teacher_entropy", "completion_length", "truncated", "tokens_per_second",
    ):  # fmt: skip
        assert all(isinstance(line[name], float | int) for line in steps), name
    assert all(0 < line["student_mass"] <= 1 for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [line for line in lines if "eval_reverse_kl" in line]
    assert [line["step"] for line in evaluations] == [0, 12]
    assert evaluations[1]["eval_reverse_kl"] < evaluations[0]["eval_reverse_kl"]
    assert evaluations[0]["eval_score"] > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.md").read_text()
    assert "| reverse KL |" in report
    assert "**tell 1**" in report
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for row in rows:
        assert " ".join(row.replace("|", "").split()) in printed
    for step in (0, 12):
        lines = (run / "samples" / f"step-{step}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == ["tell 1", "tell 2"]
    trained = load_file(run / "model" / "model.safetensors")
    initial = load_file(tmp_path / "model" / "model.safetensors")
    assert any((trained[name] != initial[name]).any() for name in initial)
    with pytest.raises(ValueError, match=r"holds another run; choose another one$"):
        train(*prepare(config))


def test_lora_trains_adapters_against_the_base_below_them(tmp_path):
    trainer = make_trainer(tmp_path, lora_r=4, learning_rate=1e-2)
    assert trainer.teachers[""].model is trainer.model
    base = load_model(str(tmp_path / "model"), "float32")
    batch = completions(2)
    trainer.train()
    ids = torch.tensor([batch[0].prompt.teacher_ids + batch[0].ids])
    with trainer.teachers[""].active() as model, torch.no_grad():
        teacher = lazy_logits(model, ids).materialize()
    with torch.no_grad():
        assert_close(teacher, lazy_logits(base, ids).materialize(), rtol=1e-5, atol=1e-5)
        student = lazy_logits(trainer.model, ids).materialize()
    assert (student - teacher).abs().max() > 1e-3


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_a_self_teacher_follows_the_student(tmp_path, rate):
    trainer = make_trainer(tmp_path, teacher_update_rate=rate, max_steps=3, learning_rate=1e-2)
    trainer.evaluation.prompts = []
    assert (trainer.teachers[""].model is trainer.model) == (rate == 1)
    expected = {n: p.detach().clone() for n, p in trainer.teachers[""].model.named_parameters()}

    class Reckon(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            for name, parameter in model.named_parameters():
                expected[name] += rate * (parameter.detach() - expected[name])

    start = {n: p.clone() for n, p in expected.items()}
    trainer.add_callback(Reckon())
    trainer.train()
    for name, parameter in trainer.teachers[""].model.named_parameters():
        assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter, start[name])


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    head = trainer.model.lm_head
    hook = head.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan,))
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda model, prompts, *seed: _without(
        hook, head, sample, model, prompts, seed
    )
    trainer.evaluation.prompts = []
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
    steps, _ = read_metrics(Path(trainer.args.output_dir))
    assert [line["skipped_steps"] for line in steps] == [1, 1]
    assert [line["loss"] for line in steps] == [0, 0]
    assert ["Not finite: " in line.get("alarm", "") for line in steps] == [True, False]


def _without(hook, head, sample, model, prompts, seed):
    """Sample while the head is healthy."""
    poison = dict(head._forward_pre_hooks)
    head._forward_pre_hooks.clear()
    result = sample(model, prompts, *seed)
    head._forward_pre_hooks.update(poison)
    return result


def test_several_completions_of_a_prompt(tmp_path):
    trainer = make_trainer(tmp_path, completions_per_prompt=3, per_device_train_batch_size=2)
    seen, learn = [], trainer.learn
    trainer.learn = lambda model, batch: seen.append(batch) or learn(model, batch)
    trainer.evaluation.prompts = []
    trainer.train()
    for batch in seen:
        texts = [c.prompt.text for c in batch]
        assert texts[:3] == [texts[0]] * 3
        assert texts[3:] == [texts[3]] * 3
        assert texts[0] != texts[3]
        assert len({tuple(c.ids) for c in batch[:3]}) > 1  # samples, not copies
    steps, _ = read_metrics(Path(trainer.args.output_dir))
    assert len(steps) == len(seen) == 4


def test_evaluation_runs_once_where_steps_and_epochs_meet(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}  # 3 steps per epoch
    config = load_config(DistillationConfig, write_recipe(tmp_path, **options), [])
    train(*prepare(config))
    _, lines = read_metrics(Path(config.output_dir))
    assert [line["step"] for line in lines if "eval_reverse_kl" in line] == [0, 3, 6]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_under_bf16_student_teacher_and_rollout_run_in_the_same_precision(tmp_path, lora_r):
    trainer = make_trainer(tmp_path, bf16=True, lora_r=lora_r, max_steps=1)
    dtypes = set()
    for model in {trainer.model, trainer.teachers[""].model}:
        for name, module in model.named_modules():
            if name.endswith("gate_proj"):
                module.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}


def test_figures_cover_all_steps_since_the_last_line(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=4, eval_on_start=False)
    seen = []
    add = trainer.sums.add_completions
    trainer.sums.add_completions = lambda batch: (seen.extend(batch), add(batch))
    trainer.train()
    (line,), _ = read_metrics(Path(trainer.args.output_dir))
    assert len(seen) == 16
    expected = sum(len(c.ids) for c in seen) / 16
    assert line["completion_length"] == pytest.approx(expected, rel=1e-6)

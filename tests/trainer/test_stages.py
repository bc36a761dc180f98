"""SFT, RLVR and evaluate: their losses against plain PyTorch, and whole runs of a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.__main__ import main, train
from opd_trainer.build import prepare
from opd_trainer.config import EvaluationConfig, RLVRConfig, SFTConfig, load_config
from opd_trainer.measures.evaluation import pass_at_k
from opd_trainer.models.load import load_model
from opd_trainer.stages.rlvr import clipped_policy_loss, kl_estimate
from tests.tiny_run import NO_TEACHER, make_trainer, read_metrics, write_model, write_recipe
from tests.trainer_steps import assert_same_step, completions, gradient_of

SERVED = {"teacher": "http://127.0.0.1:9/v1"}
RLVR = NO_TEACHER | {"completions_per_prompt": 3, "per_device_train_batch_size": 2}


def _given(folder, count=8):
    """Write rows with completions; return the key train_data."""
    rows = [{"prompt": f"say {i}", "completion": "ok" * (i % 3)} for i in range(count)]
    path = folder / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _log_probs(model, completion):
    ids = torch.tensor([completion.prompt.student_ids + completion.ids])
    log_p = lazy_logits(model, ids).materialize()[0].log_softmax(-1)
    start = len(completion.prompt.student_ids) - 1
    tokens = torch.tensor(completion.ids)
    return log_p[start : start + len(tokens)].gather(-1, tokens[:, None])[:, 0]


def _assert_gradient(trainer, expected, gradients):
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_sft_maximises_the_likelihood_however_it_is_batched(tmp_path, aggregation):
    write_recipe(tmp_path)
    options = {"train_data": _given(tmp_path), "aggregation": aggregation, **NO_TEACHER}
    trainer = make_trainer(tmp_path, SFTConfig, **options)
    batch = completions()
    step = gradient_of(trainer, batch)
    log_probs = [_log_probs(trainer.model, c) for c in batch]
    expected = -torch.cat(log_probs).mean()
    if aggregation == "sequence":
        expected = -torch.stack([x.mean() for x in log_probs]).mean()
    assert_close(step[0], expected.detach(), rtol=1e-5, atol=1e-6)
    _assert_gradient(trainer, expected, step[1])
    for size in (1, 3, 100):
        trainer.args.micro_batch_size = size
        assert_same_step(gradient_of(trainer, batch), step)


def test_sft_learns_the_given_completions(tmp_path):
    write_recipe(tmp_path)
    options = {"train_data": _given(tmp_path, 1), "max_steps": 60, "learning_rate": 0.02}
    recipe = write_recipe(tmp_path, **NO_TEACHER, **options)
    main(["sft", str(recipe)])
    steps, _ = read_metrics(tmp_path / "run")
    assert steps[-1]["loss"] < 0.05 < 1 < steps[0]["loss"]
    with pytest.raises(SystemExit, match="expected a completion in every row"):
        main(["sft", str(write_recipe(tmp_path, **NO_TEACHER)), "--output_dir", f"{tmp_path}/b"])
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "a", "completion": "toolong"}\n')
    arguments = ["sft", str(recipe), "--train_data", str(long), "--output_dir", f"{tmp_path}/c"]
    with pytest.raises(SystemExit, match=r"row 1, completion: expected at most 5 tokens, .* got 7"):
        main(arguments)


def test_sft_on_a_teachers_completions(tmp_path):
    recipe = write_recipe(tmp_path, completions_per_prompt=2, tail=None, max_steps=3)
    main(["sft", str(recipe), "--generate-from", "teacher"])
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 24
    assert [row["prompt"] for row in rows[:3]] == ["say 0", "say 0", "say 1"]
    assert len({tuple(row["ids"]) for row in rows}) > 12
    trainer = make_trainer(tmp_path / "again", SFTConfig, generate_from="teacher", tail=None)
    model = trainer.evaluation.local[""].model
    chosen = trainer.train_dataset[0]
    assert chosen.reference_ids == trainer.complete([chosen])[0].ids
    ids = torch.tensor([chosen.teacher_ids])
    likely = lazy_logits(model, ids).materialize()[0, -1].softmax(-1)
    assert likely[chosen.reference_ids[0]] > 1e-3  # sampled after the teacher's context


def test_a_resumed_run_has_the_completions_of_its_own_teachers(tmp_path):
    """Several teachers generate them one after the other."""
    write_recipe(tmp_path)
    names = ("a", "b")
    rows = [{"prompt": f"say {i}", "teacher": names[i % 2]} for i in range(8)]
    (tmp_path / "routed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(names, start=3):
        write_model(tmp_path / name, seed=seed)
    options = {"teacher": {n: str(tmp_path / n) for n in names}, "tail": None, "eval_data": None}
    options |= {"train_data": str(tmp_path / "routed.jsonl"), "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "generate_from": "teacher"}
    recipe = write_recipe(tmp_path, **options)
    first, _ = prepare(load_config(SFTConfig, recipe, []))
    first.train()
    again = load_config(SFTConfig, recipe, ["--resume_from_checkpoint", "auto"])
    resumed, checkpoint = prepare(again)
    assert checkpoint == str(tmp_path / "run" / "checkpoint-2")
    pairs = zip(resumed.train_dataset, first.train_dataset, strict=True)
    assert all(ours.reference_ids == theirs.reference_ids for ours, theirs in pairs)
    assert [p.teacher for p in resumed.train_dataset] == ["a", "b"] * 4
    lines = (tmp_path / "routed.jsonl").read_text().splitlines()
    (tmp_path / "routed.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(ValueError, match=r"train_data: the content of .*routed.jsonl' has changed"):
        prepare(again)
    # A dataset of the hub has no file to compare, but its prompts are compared.
    (tmp_path / "run" / "starts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"expected the prompts of .*, which the run began with"):
        prepare(again)


def test_adapters_on_adapters(tmp_path):
    """A stage and its self-teacher begin with the student of the stage before."""
    write_recipe(tmp_path)
    options = {"lora_r": 4, "learning_rate": 0.05, "max_steps": 2}
    data = {"train_data": _given(tmp_path), "output_dir": str(tmp_path / "sft")}
    main(["sft", str(write_recipe(tmp_path, **NO_TEACHER | options | data))])
    assert not (tmp_path / "sft" / "base").exists()
    sft = load_model(str(tmp_path / "sft" / "model"), "float32")
    ids = torch.tensor([[5, 6, 7]])

    def logits(model):
        with torch.no_grad():
            return lazy_logits(model, ids).materialize()

    assert (logits(sft) - logits(load_model(str(tmp_path / "model"), "float32"))).abs().max() > 0.1
    model = {"model": str(tmp_path / "sft" / "model")}
    trainer = make_trainer(tmp_path, **options | model)
    assert_close(logits(trainer.model), logits(sft), rtol=1e-4, atol=1e-4)
    train(trainer, None)
    with trainer.teachers[""].active() as teacher:
        assert_close(logits(teacher), logits(sft), rtol=1e-4, atol=1e-4)
    trained = load_model(str(tmp_path / "run" / "model"), "float32")
    assert_close(logits(trained), logits(trainer.model.eval()), rtol=1e-4, atol=1e-4)
    assert (logits(trained) - logits(sft)).abs().max() > 0.1
    whole = make_trainer(tmp_path, model=str(tmp_path / "sft" / "model"))  # all weights
    assert_close(logits(whole.model), logits(sft))
    assert all(p.requires_grad for p in whole.model.parameters())


def test_the_clipped_policy_loss_and_its_gradient():
    """Inside and outside of both bounds, for both signs of the advantage."""
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4, dtype=torch.float64)
    now = ratio.log().requires_grad_()
    loss, seen, clipped = clipped_policy_loss(now, torch.zeros(8), advantage, 0.2, 0.3)
    assert_close(seen, ratio)
    expected = [-1.0, -1.8, -2.2, -2.6, 1.6, 1.8, 2.2, 3.0]
    assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))
    loss.sum().backward()
    live = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.float64)
    assert_close(now.grad, -advantage * ratio * live)
    assert_close(clipped, 1 - live)


def test_the_kl_estimate_has_the_mean_and_the_gradient_of_the_reverse_kl():
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(-1), torch.randn(9, dtype=torch.float64).log_softmax(-1)
    estimates, kl = kl_estimate(p, q), (p.exp() * (p - q)).sum()
    assert (estimates >= 0).all()
    assert_close((p.exp() * estimates).sum(), kl)
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (actual,) = torch.autograd.grad((p.exp().detach() * estimates).sum(), logits)
    assert_close(actual, expected)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_rlvr_follows_the_group_relative_advantage(tmp_path, kl_coef):
    """For given advantages, compared with plain PyTorch; the ratio is 1, so nothing is clipped."""
    trainer = make_trainer(tmp_path, RLVRConfig, kl_coef=kl_coef, **RLVR)
    if kl_coef:
        with torch.no_grad():
            trainer.start.model.lm_head.weight.mul_(1.1)
    batch = [
        replace(c, advantage=a) for c, a in zip(completions(), [1, -1, 0, 2, 0.5, -3], strict=True)
    ]
    step = gradient_of(trainer, batch)
    terms = []
    for c in batch:
        now = _log_probs(trainer.model, c)
        terms.append(-(now - now.detach()).exp() * c.advantage)
        if kl_coef:
            start = _log_probs(trainer.start.model, c).detach()
            values = (start - now).exp() - 1 - (start - now)
            surrogate = now * (now - start).detach()  # its gradient is the reverse KL's
            terms[-1] += kl_coef * (values.detach() + surrogate - surrogate.detach())
    expected = torch.cat(terms).mean()
    assert_close(step[0], expected.detach(), rtol=1e-5, atol=1e-6)
    _assert_gradient(trainer, expected, step[1])
    trainer.args.micro_batch_size = 4
    assert_same_step(gradient_of(trainer, batch), step)


def test_rewards_become_advantages_within_their_prompt(tmp_path):
    trainer = make_trainer(tmp_path, RLVRConfig, **RLVR)
    rewards = iter([1.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    trainer.evaluation.scorer = lambda text, row: next(rewards)
    batch = trainer.complete(trainer.train_dataset[:2])
    assert [c.reward for c in batch] == [1, 0, 0, 5, 5, 5]
    deviation = 3**-0.5
    expected = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 0, 0, 0]
    assert [c.advantage for c in batch] == pytest.approx(expected)
    trainer.sums.clear()
    trainer.sums.add_completions(batch)
    means = trainer.sums.means()
    assert (means["reward"], means["informative"]) == (16 / 6, 0.5)
    rewards = iter([1.0, 1.0 + 1e-7, 1.0] * 2)
    noise = [c.advantage for c in trainer.complete(trainer.train_dataset[:2])]
    assert max(map(abs, noise)) < 0.01


def test_rlvr_raises_its_reward(tmp_path):
    (tmp_path / "reward.py").write_text("def es(text, row):\n    return text.count('e') / 6\n")
    options = {"scorer": f"{tmp_path}/reward.py:es", "completions_per_prompt": 8}
    options |= {"max_steps": 16, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    recipe = write_recipe(tmp_path, **NO_TEACHER | options, steps_per_rollout=2, kl_coef=0.01)
    main(["rlvr", str(recipe)])
    steps, lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert steps[-1]["reward"] > 10 * steps[0]["reward"]
    for fresh, reused in zip(steps[::2], steps[1::2], strict=True):
        assert fresh["reward"] == reused["reward"]  # the same completions
        assert fresh["ratio"] == pytest.approx(1, abs=1e-4)
        assert abs(reused["ratio"] - 1) > 1e-4
    assert lines[-1]["eval_score"] > lines[0]["eval_score"]


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (RLVRConfig, {"scorer": None}, "scorer: missing; it is the reward"),
        (RLVRConfig, {"completions_per_prompt": 1}, "expected at least 2, since a reward counts"),
        (RLVRConfig, {"top_p": 0.9}, "expected top_p: 1 and no sampling_temperature"),
        (RLVRConfig, {"teacher": "x"}, "teacher: unknown key"),
        (SFTConfig, {"generate_from": "teacher"}, "teacher: missing; it generates"),
        (SFTConfig, {"completions_per_prompt": 2}, "expected 1 with completions from the data"),
        (EvaluationConfig, {"eval_data": None}, "eval_data: missing"),
        (EvaluationConfig, {"prefix_probe": True}, "it needs a teacher and a scorer"),
        (EvaluationConfig, SERVED | {"prefix_probe": True}, "prefix_probe: .*, not a server"),
        (EvaluationConfig, SERVED | {"temperature": 0.5}, "temperature: expected 1 with a server"),
        (SFTConfig, SERVED | {"generate_from": "teacher"}, "generate_from: .*, not a server"),
    ],
)
def test_what_a_stage_refuses(tmp_path, stage, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(stage, write_recipe(tmp_path, **NO_TEACHER | changes), [])


def test_evaluate_measures_without_training(tmp_path, capsys):
    write_model(tmp_path / "other", seed=3)
    options = {"teacher": str(tmp_path / "other"), "tail": None, "prefix_probe": True}
    options |= {"eval_completions_per_prompt": 4, "train_data": None}
    recipe = write_recipe(tmp_path, **options)
    (tmp_path / "scorer.py").write_text("def length(text, row):\n    return float('e' in text)\n")
    main(["evaluate", str(recipe)])
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.jsonl").read_text())
    for name in ("eval_reverse_kl", "eval_overlap", "eval_score", "eval_teacher_score",
                 "eval_pass_at_1", "eval_pass_at_2", "eval_pass_at_4", "eval_context_kl",
                 "eval_probe_score", "eval_probe_right_to_wrong"):  # fmt: skip
        assert isinstance(metrics[name], float), name
    assert metrics["eval_pass_at_1"] <= metrics["eval_pass_at_2"] <= metrics["eval_pass_at_4"]
    assert metrics["eval_pass_at_1"] == pytest.approx(metrics["eval_score"])
    assert "reverse_kl" in capsys.readouterr().out
    assert len((run / "samples" / "step-0.jsonl").read_text().splitlines()) == 2
    before = load_model(str(tmp_path / "model"), "float32").state_dict()
    with pytest.raises(SystemExit, match="holds another run"):
        main(["evaluate", str(recipe)])
    main(["report", str(run), "--output", str(tmp_path / "report.html")])
    assert "reverse KL" in (tmp_path / "report.html").read_text()
    options = NO_TEACHER | {"eval_greedy": True, "dtype": "bfloat16"}
    main(["evaluate", str(write_recipe(tmp_path, **options, output_dir=f"{tmp_path}/greedy"))])
    greedy = json.loads((tmp_path / "greedy/metrics.jsonl").read_text())
    assert not any("kl" in name for name in greedy)
    after = load_model(str(tmp_path / "model"), "float32").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_greedy_completions_are_the_likeliest(tmp_path):
    trainer = make_trainer(tmp_path)
    prompt = trainer.train_dataset[0]
    (first,) = trainer.sampler.sample(trainer.model, [prompt], 1, greedy=True)
    (second,) = trainer.sampler.sample(trainer.model, [prompt], 2, greedy=True)
    assert first == second
    ids = [*prompt.student_ids]
    for token in first.ids:
        assert (
            int(lazy_logits(trainer.model, torch.tensor([ids])).materialize()[0, -1].argmax())
            == token
        )
        ids.append(token)


def test_pass_at_k_is_the_chance_of_one_that_is_right():
    assert pass_at_k(4, 0, 2) == 0
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 3, 2) == 1

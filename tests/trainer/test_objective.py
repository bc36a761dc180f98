"""The loss that the keys of a recipe describe: objectives, skipped tokens and warnings."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from opd_kernels import LazyLogits, forward_kl, reverse_kl
from opd_trainer.__main__ import train
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.stages.distillation import add_where_uncertain, build_loss, clamp
from tests.reference import make_logits
from tests.tiny_run import make_trainer, read_metrics, write_model, write_recipe
from tests.trainer_steps import assert_same_step, completions, gradient_of


def test_the_policy_gradient_is_of_the_sampled_tokens(tmp_path):
    """Compared with a loop over sequences of log p(y) times the detached log-ratio."""
    trainer = make_trainer(tmp_path, objective="policy_gradient", tail=None)
    batch = completions()
    loss, gradients, sums = gradient_of(trainer, batch)
    terms = []
    for c in batch:
        ours = torch.tensor([c.prompt.student_ids + c.ids])
        theirs = torch.tensor([c.prompt.teacher_ids + c.ids])
        y = torch.tensor(c.ids)[:, None]
        log_p = trainer.model(ours).logits[0, len(c.prompt.student_ids) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            log_q = trainer.teachers[""].model(theirs).logits[0, len(c.prompt.teacher_ids) - 1 : -1]
            log_q = log_q.log_softmax(-1).gather(1, y)
        log_p = log_p.gather(1, y)
        terms.append((log_p * (log_p - log_q).detach())[:, 0])
    expected = torch.cat(terms).mean()
    assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)
    assert sums["student_mass"] / sums["scored_tokens"] > 0.1  # of the top-K


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_what_is_left_out_is_as_if_it_were_not_there(tmp_path, aggregation):
    """Truncated completions, and the tokens after max_loss_tokens of each."""
    batch = completions()
    trainer = make_trainer(
        tmp_path, aggregation=aggregation, skip_truncated=True, max_loss_tokens=3
    )
    actual = gradient_of(trainer, batch)
    assert (actual[2]["tokens"], actual[2]["truncated"]) == (sum(len(c.ids) for c in batch), 3)
    kept = [replace(c, ids=c.ids[:3]) for c in batch if not c.truncated]
    assert actual[2]["scored_tokens"] == sum(len(c.ids) for c in kept)
    trainer.args.skip_truncated, trainer.args.max_loss_tokens = False, None
    expected = gradient_of(trainer, kept)
    assert_same_step((*actual[:2], {}), (*expected[:2], {}))


def test_a_batch_of_truncated_completions_teaches_nothing(tmp_path):
    trainer = make_trainer(tmp_path, skip_truncated=True, max_steps=1)
    batch = [c for c in completions() if c.truncated]
    loss, gradients, sums = gradient_of(trainer, batch)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert gradients.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert sums.get("scored_tokens", 0) == 0


def test_forward_kl_is_added_where_the_teacher_is_uncertain():
    student, teacher = make_logits(tokens=9), make_logits(tokens=9, requires_grad=False)
    s = student.topk(5)
    t = teacher.gather(s.ids, entropy=True)
    bound = float(t.entropy.median())
    mixture = partial(add_where_uncertain, reverse_kl, forward_kl, 0.3, bound)
    above = t.entropy > bound
    assert 0 < above.sum() < 9
    expected = reverse_kl(s, t) + 0.3 * above * forward_kl(s, t)
    assert_close(mixture(s, t), expected)
    most = float(expected.detach().median())
    clamped = clamp(mixture, most, s, t)
    assert_close(clamped, expected.clamp_max(most))
    (slope,) = torch.autograd.grad(clamped.sum(), s.values)
    assert not slope[expected > most].any()
    assert slope[expected < most].any(-1).all()


@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_a_forward_kl_beside_the_reverse_kl_brings_back_an_answer_that_the_student_lacks(
    tmp_path, tail
):
    """The teacher has two equal answers of 0.4; the student knows only the first, outside whose
    top-K the second lies. The reverse KL alone keeps it there.
    """
    config = make_trainer(tmp_path, tail=tail, k=5).args
    q = torch.full((1, 50), 0.2 / 48, dtype=torch.float64)
    q[0, [3, 30]] = 0.4
    one = torch.ones(1, 1, dtype=torch.float64)
    teacher = LazyLogits(one, q.log().T)

    def entropy_after_descent(coefficient):
        z = torch.linspace(0, -2, 50, dtype=torch.float64)[None].clone()
        z[0, 3], z[0, 30] = 5.0, -4.0
        z = z.T.requires_grad_()
        config.forward_kl_coef = coefficient
        loss = build_loss(config)
        for _ in range(1500):  # with Adam, each logit outside S would rise as fast as any other
            output = loss(LazyLogits(one, z), teacher)
            z.data -= torch.autograd.grad(output.loss, z)[0]
        p = z.detach()[:, 0].softmax(0)
        return float(-(p * p.log()).sum()), p

    expected = float(-(q * q.log()).sum())
    entropy, p = entropy_after_descent(1.0)
    assert entropy == pytest.approx(expected, abs=0.1)
    assert_close(p[[3, 30]], q[0, [3, 30]], rtol=0.02, atol=0)
    assert entropy_after_descent(0.0)[1][30] < 0.05


@pytest.mark.parametrize("support", ["student", "teacher", "union", "full"])
def test_the_forward_kl_is_of_the_teachers_top_k_and_the_reverse_kl_of_the_support(
    tmp_path, support
):
    config = make_trainer(tmp_path, support=support, forward_kl_coef=0.3, k=5).args
    student, teacher = make_logits(tokens=9), make_logits(tokens=9, requires_grad=False)
    output = build_loss(config)(student, teacher, reduction="none")
    everything = torch.arange(student.vocab_size).expand(9, -1)
    ids = {"full": everything, "student": student.topk(5).ids, "teacher": teacher.topk(5).ids}
    both = torch.cat([ids["student"], ids["teacher"]], dim=-1)
    ids["union"] = both
    wide = ids[support] if support in ("teacher", "full") else both
    pairs = [(student.gather(i), teacher.gather(i)) for i in (ids[support], wide)]
    expected = reverse_kl(*pairs[0], tail=config.tail)
    expected = expected + 0.3 * forward_kl(*pairs[1], tail=config.tail)
    assert_close(output.per_token, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "support"),
    [("reverse_kl", "full"), ("forward_kl", "teacher"), ("jsd", "union"), ("jsd", "intersection")],
)
def test_every_objective_and_support_runs(tmp_path, objective, support):
    """With another model as teacher and no privileged context."""
    write_recipe(tmp_path)
    write_model(tmp_path / "teacher", seed=9, name="qwen3")
    config = load_config(DistillationConfig, 
        write_recipe(
            tmp_path, teacher=str(tmp_path / "teacher"), privileged_context=None, eval_data=None,
            scorer=None, objective=objective, support=support, max_steps=8, learning_rate=3e-3,
        ), [],
    )  # fmt: skip
    train(*prepare(config))
    steps, _ = read_metrics(Path(config.output_dir))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert not (Path(config.output_dir) / "report.md").exists()


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"tail": "drop", "k": 2}, True),
        ({"tail": "bucket", "k": 2}, False),
        ({"tail": "drop", "k": 97}, False),
    ],
)
def test_a_drifting_support_is_warned_of_once(tmp_path, capsys, changes, warns):
    trainer = make_trainer(tmp_path, max_steps=3, eval_on_start=False, preflight=False, **changes)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    messages = [line for line in lines if line.startswith("alarm: ")]
    assert len(messages) == int(warns)
    assert all("holds less than 95 %" in message for message in messages)
    assert all("tail: bucket, support: full, a larger k" in message for message in messages)


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({}, False),
        ({"top_p": 0.9}, True),
        ({"temperature": 0.7, "sampling_temperature": 1.0}, True),
        ({"temperature": 0.7, "sampling_temperature": 0.7}, False),
    ],
)
def test_samples_from_another_distribution_are_warned_of(tmp_path, changes, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        trainer = make_trainer(tmp_path, **changes)
    assert any("to be on-policy" in str(w.message) for w in caught) == warns
    wanted = changes.get("sampling_temperature", 1.0)
    assert (trainer.sampler.options.temperature, trainer.sampler.options.top_p) == (
        wanted, changes.get("top_p", 1.0),
    )  # fmt: skip


def test_a_function_of_the_user_is_the_objective(tmp_path):
    """It gets the policy gradient's inputs on sampled tokens, and reverse_kl's on a support."""
    (tmp_path / "losses.py").write_text(
        "from opd_kernels import policy_gradient, reverse_kl\n"
        "def on_sample(student, teacher):\n    return policy_gradient(student, teacher)\n"
        "def on_top(student, teacher):\n    return 1 * reverse_kl(student, teacher)\n"
    )
    batch, losses = completions(), f"{tmp_path}/losses.py"
    for changes, named in (
        ({"objective": f"{losses}:on_sample", "support": "sampled"}, "policy_gradient"),
        ({"objective": f"{losses}:on_top"}, "reverse_kl"),
    ):
        expected = gradient_of(make_trainer(tmp_path, objective=named, tail=None), batch)
        assert_same_step(gradient_of(make_trainer(tmp_path, tail=None, **changes), batch), expected)
    with pytest.raises(ValueError, match=r"objective: expected reverse_kl, .* no such function"):
        make_trainer(tmp_path, objective=f"{losses}:no_such", tail=None)

"""Gradients of a training step on given completions, and their comparison."""

import pytest
import torch
from torch.testing import assert_close

from opd_trainer.data import Prompt
from opd_trainer.models.rollout import Completion


def completions(count=6):
    """Return fixed completions of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(length):
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    result = []
    for i in range(count):
        context = ids(3 + i)
        prompt = Prompt("", context, [*ids(4), *context])
        result.append(Completion(prompt, [*ids(1 + 2 * i % 7), 2], truncated=i % 2 == 0))
    return result


def gradient_of(trainer, batch):
    """Return loss, gradients by parameter and sums of one step."""
    trainer.model.zero_grad()
    trainer.sums.clear()
    loss = trainer.learn(trainer.model, batch)
    sums = dict(trainer.sums)
    gradients = {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }
    return loss, gradients, sums


def assert_same_step(actual, expected):
    assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(actual[1], expected[1])
    for name, total in expected[2].items():
        assert actual[2][name] == pytest.approx(total, rel=1e-4)


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        message = f"{name}: {{}}".format
        assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=message)

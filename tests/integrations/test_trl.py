"""distil_with accepts the trainers whose loss it can replace, and no other."""

import re
import threading
from functools import wraps

import pytest
import torch

trl = pytest.importorskip("trl")

from trl import DistillationTrainer  # noqa: E402
from trl.experimental.server_distillation import ServerDistillationTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from opd_kernels.integrations.trl import distil_with  # noqa: E402
from tests.integrations.test_peers import _trl_trainer  # noqa: E402

_chunked_divergence_loss = distillation_trainer._chunked_divergence_loss  # its own binding


def bare(cls):
    """A trainer that is not initialised, which would need models."""
    return cls.__new__(cls)


class OwnComputeLoss(DistillationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class OwnInnerLoss(DistillationTrainer):
    """Its compute_loss calls TRL's, which calls its own _compute_loss."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        return unwrapped_student(**inputs).loss, torch.zeros(()), torch.zeros(())


class OwnBinding(DistillationTrainer):
    """Its own name of TRL's function is not replaced."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        return _chunked_divergence_loss(**inputs)


class OwnStep(DistillationTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        loss.backward()
        return loss


class ChildOfOwnStep(OwnStep):
    pass


@pytest.mark.parametrize(
    "cls",
    [OwnComputeLoss, OwnInnerLoss, OwnBinding, OwnStep, ChildOfOwnStep, ServerDistillationTrainer],
)
def test_a_trainer_that_computes_its_loss_elsewhere_is_refused(cls):
    trainer = bare(cls)
    with pytest.raises(
        TypeError,
        match="trainer: expected a trainer that calls DistillationTrainer's compute_loss, got "
        f"{cls.__name__}, which computes its loss elsewhere; call super",
    ):
        distil_with(trainer)
    assert "compute_loss" not in trainer.__dict__


def logged(method):
    @wraps(method)
    def wrapper(*args, **kwargs):
        return method(*args, **kwargs)

    return wrapper


def unnamed(method):
    return lambda *args, **kwargs: method(*args, **kwargs)


class Scaled(DistillationTrainer):
    """Calls TRL's methods, with decorators, by a helper and with a term of its own."""

    @logged
    def compute_loss(self, *args, **kwargs):
        return self._twice(*args, **kwargs)

    def _twice(self, *args, **kwargs):
        return 2 * DistillationTrainer.compute_loss(self, *args, **kwargs)

    @unnamed
    def _compute_loss(self, *args, **kwargs):
        loss, entropy, count = super()._compute_loss(*args, **kwargs)
        return loss + 1, entropy, count

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def test_a_subclass_that_calls_trls_methods_is_distilled(tmp_path, monkeypatch):
    losses = []
    for cls, plug in ((DistillationTrainer, distil_with), (Scaled, distil_with)):
        monkeypatch.setattr(trl, "DistillationTrainer", cls)
        trainer = plug(_trl_trainer(tmp_path, 1.0), support="student", k=3)
        trainer.train()
        losses.append(next(x["loss"] for x in trainer.state.log_history if "loss" in x))
    assert losses[1] == pytest.approx(2 * (losses[0] + 1), rel=1e-5)


class Sometimes(DistillationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.beta < 2:
            return torch.zeros((), requires_grad=True)
        return super().compute_loss(model, inputs)


def test_a_step_without_the_loss_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "DistillationTrainer", Sometimes)
    trainer = distil_with(_trl_trainer(tmp_path, 1.0))
    with pytest.raises(
        RuntimeError,
        match="trainer: expected Sometimes to call TRL's _chunked_divergence_loss, got a loss "
        "without it",
    ):
        trainer.train()
    assert distillation_trainer._chunked_divergence_loss is _chunked_divergence_loss


def renamed(student_hidden_states, teacher_hidden_states, mask):
    raise AssertionError


def test_a_loss_of_another_signature_is_refused_at_once(monkeypatch):
    name = "_chunked_divergence_loss"
    monkeypatch.setattr(distillation_trainer, name, renamed)
    message = (
        f"trl: expected trl.trainer.distillation_trainer.{name} with the parameters of TRL 1.16, "
        "['student_hidden_states', "
    )
    got = "got ['student_hidden_states', 'teacher_hidden_states', 'mask']; install that version"
    with pytest.raises(RuntimeError, match=f"{re.escape(message)}.*{re.escape(got)}"):
        distil_with(bare(DistillationTrainer))
    monkeypatch.delattr(distillation_trainer, name)
    with pytest.raises(RuntimeError, match=f"{re.escape(message)}.*got none; install that version"):
        distil_with(bare(DistillationTrainer))


def test_a_second_call_replaces_the_options(tmp_path):
    losses = []
    for earlier in ({}, {"support": "teacher", "k": 9}):
        trainer = distil_with(_trl_trainer(tmp_path, 1.0), **earlier)
        distil_with(trainer, support="student", k=3).train()
        losses.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert losses[0] == losses[1]


def test_other_threads_compute_trls_loss():
    """Two distilled trainers and TRL's own function, at the same time."""
    trainers = [distil_with(bare(Direct)), distil_with(bare(Direct))]
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, 4, 8), torch.randn(20, 8)), (
        torch.randn(1, 4, 8), torch.randn(20, 8)
    )  # fmt: skip
    operands = (student[0], teacher[0], student[1], teacher[1], torch.ones(1, 4), 1.0)
    expected, seen = _chunked_divergence_loss(*operands)[0], []

    def inside():
        def look():
            seen.append(distillation_trainer._chunked_divergence_loss(*operands)[0])
            seen.append(trainers[1].compute_loss(lambda: None, operands)[0])

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    seen.append(trainers[0].compute_loss(inside, operands)[0])
    assert distillation_trainer._chunked_divergence_loss is _chunked_divergence_loss
    assert len(seen) == 3
    for loss in seen:
        assert loss == pytest.approx(float(expected), rel=1e-5)


class Direct(DistillationTrainer):
    """Its compute_loss calls the function that TRL's module has then."""

    def compute_loss(self, inside, operands):
        inside()
        return distillation_trainer._chunked_divergence_loss(*operands)

    def training_step(self, model, inputs):
        return self._compute_loss(model, inputs, None)

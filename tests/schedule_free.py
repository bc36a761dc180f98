"""A schedule-free optimiser with the interface of the package schedulefree."""

import sys
from types import ModuleType

import torch


class SGDScheduleFree(torch.optim.Optimizer):
    """SGD whose gradients are taken at y = 0.9 x + 0.1 z; x averages z (arXiv 2405.15682).

    The model holds y in mode train and x in mode eval; a step in mode eval is refused.
    """

    def __init__(self, params, lr, **_):
        super().__init__(params, {"lr": lr, "train_mode": False, "steps": 0})
        self.modes = []

    def _move(self, train):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != train else []:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], 0.1 if train else 1 - 1 / 0.9)
            group["train_mode"] = train

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            group["steps"] += 1
            for p in [p for p in group["params"] if p.grad is not None]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / 0.9)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["steps"])
                p.copy_(x.lerp(z, 0.1))


def install(monkeypatch):
    """Make `optim: schedule_free_sgd` use this optimiser."""
    module = ModuleType("schedulefree")
    vars(module).update(SGDScheduleFree=SGDScheduleFree, AdamWScheduleFree=SGDScheduleFree)
    monkeypatch.setitem(sys.modules, "schedulefree", module)
    available = "transformers.trainer_optimizer.is_schedulefree_available"
    monkeypatch.setattr(available, lambda *_: True)

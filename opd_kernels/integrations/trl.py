"""Use this package's loss in TRL's distillation trainer:

    distil_with(trainer, support="student", k=20, objective=reverse_kl)

TRL continues to do everything else, such as rollouts, batches and logging.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer
from trl.trainer import distillation_trainer

from opd_kernels.checks import got
from opd_kernels.divergences import jsd
from opd_kernels.lazy_logits import LazyLogits
from opd_kernels.loss.distill import distillation_loss
from opd_kernels.parallel import is_dtensor, plain

_LOSS = "_chunked_divergence_loss"  # the function of TRL's module that its trainer calls


def distil_with(trainer: DistillationTrainer, **options: Any) -> DistillationTrainer:
    """Make a trainer compute its loss with distillation_loss from hidden states and heads.

    Args:
        trainer: TRL's DistillationTrainer, before or during training. A subclass may change the
            loss, if it calls the methods of DistillationTrainer that compute it.
        **options: options of distillation_loss. The default is support="full" and the generalised
            JSD with the trainer's beta, which is TRL's own loss.

    Returns:
        The same trainer.

    Raises:
        TypeError: trainer is not a DistillationTrainer, or it computes its loss elsewhere.
        RuntimeError: the installed TRL has no function to replace, or one with other parameters; in
            a training step, the trainer has not called it.
    """
    if not isinstance(trainer, DistillationTrainer):
        raise TypeError(f"trainer: expected TRL's DistillationTrainer, got {got(trainer)}")
    _check_parameters()
    if not _calls_loss(type(trainer)):
        raise TypeError(
            f"trainer: expected a trainer that calls DistillationTrainer's compute_loss, got "
            f"{got(trainer)}, which computes its loss elsewhere; call super().compute_loss there, "
            "or call distillation_loss in its own method"
        )
    # A second call replaces the options of the first.
    compute_loss = getattr(trainer.compute_loss, "without_ours", trainer.compute_loss)

    @wraps(compute_loss)
    def compute_loss_with_ours(*args: Any, **kwargs: Any) -> Any:
        with _replaced_loss(partial(_loss, options)) as calls:
            result = compute_loss(*args, **kwargs)
        if not calls:
            raise RuntimeError(
                f"trainer: expected {got(trainer)} to call TRL's {_LOSS}, got a loss without it; "
                "distil_with cannot replace the loss of this trainer, call distillation_loss in "
                "its compute_loss"
            )
        return result

    compute_loss_with_ours.without_ours = compute_loss  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss_with_ours
    return trainer


def _check_parameters() -> None:
    """Raise RuntimeError unless TRL's loss has the parameters of its replacement."""
    theirs = getattr(distillation_trainer, _LOSS, None)
    parameters = [] if theirs is None else list(inspect.signature(theirs).parameters)
    expected = list(inspect.signature(_loss).parameters)[1:]
    if parameters != expected:
        raise RuntimeError(
            f"trl: expected trl.trainer.distillation_trainer.{_LOSS} with the parameters of TRL "
            f"1.16, {expected}, got {'none' if theirs is None else parameters}; install that "
            "version, or call distillation_loss in your own trainer"
        )


def _calls_loss(trainer: type) -> bool:
    """Return whether training_step leads to TRL's loss, by the names in the methods' code. A name
    stands for the method of the first class, and beside super() or a class also for the next one.
    """
    classes = trainer.__mro__
    parents = {"super", *(cls.__name__ for cls in classes)}
    seen: set[tuple[str, int]] = set()
    pending = [("training_step", 0)]
    while pending:
        name, first = pending.pop()
        index = next((i for i in range(first, len(classes)) if name in vars(classes[i])), None)
        if index is None or (name, index) in seen:
            continue
        seen.add((name, index))
        for function in _functions(vars(classes[index])[name]):
            names = _names(function.__code__)
            scope = function.__globals__  # a module's own binding of the loss is not replaced
            if _LOSS in names and (scope is vars(distillation_trainer) or _LOSS not in scope):
                return True
            pending += [(other, 0) for other in names]
            pending += [(other, index + 1) for other in names if names & parents]
    return False


def _functions(method: Any) -> list[FunctionType]:
    """Return the function of a method, and those that its decorators keep."""
    found, pending = [], [getattr(method, "__func__", method)]
    while pending:
        function = pending.pop()
        if isinstance(function, FunctionType) and function not in found:
            found.append(function)
            pending += inspect.getclosurevars(function).nonlocals.values()
    return found


def _names(code: CodeType) -> set[str]:
    """Return the names that a function and the functions inside it use."""
    inner = (_names(x) for x in code.co_consts if isinstance(x, CodeType))
    return set(code.co_names).union(*inner)


class _Thread(threading.local):
    loss: Callable[..., Any] | None = None  # what this thread's trainer computes


_thread, _lock, _originals = _Thread(), threading.Lock(), list[Callable[..., Any]]()


@contextmanager
def _replaced_loss(loss: Callable[..., Any]) -> Iterator[list[None]]:
    """Replace TRL's function for this thread, and yield a list that grows with every call.

    Trainers in other threads that are not distilled by this package still compute TRL's loss.
    """
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return loss(*args, **kwargs)

    with _lock:
        original = _originals[0] if _originals else getattr(distillation_trainer, _LOSS)

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            return (_thread.loss or original)(*args, **kwargs)

        _originals.append(original)
        setattr(distillation_trainer, _LOSS, dispatch)
    outer, _thread.loss = _thread.loss, counted
    try:
        yield calls
    finally:
        _thread.loss = outer
        with _lock:
            _originals.pop()
            if not _originals:
                setattr(distillation_trainer, _LOSS, original)


def _loss(
    options: dict[str, Any],
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replacement of TRL's loss with its signature. Return the loss, the sum of the student's
    entropies and the number of tokens.
    """

    def gather(weight: Any, hidden: Tensor) -> Any:
        """Gather a weight that FSDP2 has sharded again after its forward pass. The shards are the
        master weights, so cast the result to the dtype of the hidden states.
        """
        return plain(weight, whole=True).to(hidden.dtype) if is_dtensor(weight) else weight

    if is_dtensor(student_lm_head_weight) and student_lm_head_weight.requires_grad:
        raise ValueError(
            "trl: expected the student's whole head during the forward pass, got a shard, whose "
            "gradient would not be summed over the ranks; leave the head to FSDP2's root module, "
            "as accelerate does"
        )
    student = LazyLogits(
        student_hidden_states,
        gather(student_lm_head_weight, student_hidden_states),
        gather(student_lm_head_bias, student_hidden_states),
        student_final_logit_softcapping,
        student_logit_scale,
        temperature,
    )
    teacher = LazyLogits(
        teacher_hidden_states,
        gather(teacher_lm_head_weight, teacher_hidden_states),
        gather(teacher_lm_head_bias, teacher_hidden_states),
        teacher_final_logit_softcapping,
        teacher_logit_scale,
        temperature,
    )
    weights = (completion_mask != 0).float()
    count = weights.sum()
    denominator = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    defaults: dict[str, Any] = {"support": "full", "objective": partial(jsd, beta=beta)}
    options = defaults | options
    options |= {"token_weights": weights, "denominator": denominator, "entropy": True}
    output = distillation_loss(student, teacher, **options)
    assert output.student.entropy is not None
    entropy = torch.where(weights > 0, output.student.entropy, 0.0).sum()
    return output.loss, entropy, count.long()

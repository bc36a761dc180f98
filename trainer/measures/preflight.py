"""Checks before training: whether the run fits, and whether there is something to learn."""

import psutil
import torch

from trainer.config import DistillationConfig
from trainer.data import Prompt
from trainer.measures.diagnostics import DRIFT
from trainer.measures.evaluation import Evaluation
from trainer.models.load import Model
from trainer.models.teacher import LocalTeacher

_GIB = 2**30
_PROMPTS, _SEED = 8, 1 << 32


def preflight(
    student: Model, evaluation: Evaluation, prompts: list[Prompt], start: LocalTeacher | None
) -> list[str]:
    """Return one sentence per finding, with a remedy if it is bad; `start` uses memory too."""
    config = evaluation.config
    models = [student, *(x.model for x in (*evaluation.local.values(), start) if x)]
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    weights = sum(p.nbytes for p in parameters)
    # A gradient and AdamW's two moments.
    states = sum(p.nbytes + 8 * p.numel() for p in parameters if p.requires_grad)
    if config.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available + weights  # the weights are loaded already
    memory = (
        f"memory: {weights / _GIB:.1f} GiB of weights, {states / _GIB:.1f} GiB of gradients and "
        f"AdamW's state, beside activations; {free / _GIB:.1f} GiB are free"
    )
    if weights + states > free:
        memory += "; it does not fit: set lora_r, or a smaller model or teacher_dtype"
    findings = [memory]
    if config.save_strategy != "no":
        size = sum(p.nbytes + 8 * p.numel() for p in student.parameters() if p.requires_grad)
        free = psutil.disk_usage(config.output_dir).free
        disk = f"disk: {size / _GIB:.1f} GiB for a checkpoint; {free / _GIB:.1f} GiB are free"
        if 2 * size > free:  # a checkpoint is removed only after the next one is whole
            disk += "; that is too little for two: make room, or choose another output_dir"
        findings.append(disk)
    if isinstance(config, DistillationConfig):
        findings += _gap(config, student, evaluation, prompts)
    return findings


def _gap(
    config: DistillationConfig, student: Model, evaluation: Evaluation, prompts: list[Prompt]
) -> list[str]:
    """Measure the distance to the teacher on the student's own samples, and the mass on S."""
    few = prompts[:: max(1, len(prompts) // _PROMPTS)][:_PROMPTS]
    sampled = evaluation.sampler.sample(student, few, config.seed, _SEED)
    means = evaluation.divergence(student, sampled)
    kl, mass = means["kl"], means["student_mass"]
    gap = f"gap: reverse KL of {kl:.3g} nats per token on {len(few)} samples of the student"
    if kl < 0.01:
        gap += "; there is next to nothing to learn: check teacher and privileged_context"
    elif kl > 3:
        gap += "; that is far for on-policy learning: run the sft stage first"
    support = f"support: the top {config.k} hold {mass:.1%} of the student's mass"
    return [gap, f"{support}. {DRIFT}" if config.drops_mass and mass < 0.95 else support]

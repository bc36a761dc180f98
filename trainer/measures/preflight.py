"""What can be known before training: whether it fits, and whether there is something to learn."""

import psutil
import torch

from trainer.config import DistillationConfig, StageConfig
from trainer.data import Prompt
from trainer.measures.diagnostics import DRIFT
from trainer.measures.evaluation import Evaluation
from trainer.models.load import Model

_GIB = 2**30
_PROMPTS, _SEED = 8, 1 << 32


def preflight(
    config: StageConfig,
    student: Model,
    evaluation: Evaluation,
    prompts: list[Prompt],
    *others: Model,
) -> list[str]:
    """A sentence for each finding; what is bad says what to do. Others are models in memory too."""
    local = [teacher.model for teacher in evaluation.local.values()]
    found = [_memory(config, student, *local, *others), *_disk(config, student)]
    if isinstance(config, DistillationConfig):
        found += _gap(config, student, evaluation, prompts)
    return found


def _memory(config: StageConfig, *models: Model) -> str:
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    weights = sum(p.nbytes for p in parameters)
    # A gradient and AdamW's two moments.
    states = sum(p.nbytes + 8 * p.numel() for p in parameters if p.requires_grad)
    if config.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available + weights  # which are there already
    text = (
        f"memory: {weights / _GIB:.1f} GiB of weights, {states / _GIB:.1f} GiB of gradients and "
        f"AdamW's state, beside activations; {free / _GIB:.1f} GiB are free"
    )
    bad = "; it does not fit: set lora_r, or a smaller model or teacher_dtype"
    return text + bad * (weights + states > free)


def _disk(config: StageConfig, student: Model) -> list[str]:
    if config.save_strategy == "no":
        return []
    learned = [p for p in student.parameters() if p.requires_grad]
    size = sum(p.nbytes + 8 * p.numel() for p in learned)  # with AdamW's state
    free = psutil.disk_usage(config.output_dir).free
    text = f"disk: {size / _GIB:.1f} GiB for a checkpoint; {free / _GIB:.1f} GiB are free"
    # The next one is whole before the last one goes.
    few = "; that is too little for two: make room, or choose another output_dir"
    return [text + few * (2 * size > free)]


def _gap(
    config: DistillationConfig, student: Model, evaluation: Evaluation, prompts: list[Prompt]
) -> list[str]:
    """How far the student is from the teacher on its own samples, and the mass on S."""
    few = prompts[:: max(1, len(prompts) // _PROMPTS)][:_PROMPTS]
    sampled = evaluation.sampler.sample(student, few, config.seed, _SEED)
    means = evaluation.divergence(student, sampled)
    gap, mass = means["kl"], means["student_mass"]
    sentence = f"gap: reverse KL of {gap:.3g} nats per token on {len(few)} samples of the student"
    if gap < 0.01:
        sentence += "; there is next to nothing to learn: see teacher and privileged_context"
    elif gap > 3:
        sentence += "; that is far for on-policy learning: run the sft stage first"
    support = f"support: the top {config.k} hold {mass:.1%} of the student's mass"
    if config.drops_mass and mass < 0.95:
        support += f". {DRIFT}"
    return [sentence, support]

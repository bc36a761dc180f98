"""What can be known before training: whether it fits, and whether there is something to learn."""

import psutil
import torch

from trainer.config import DistillationConfig, StageConfig, TeacherConfig, is_server
from trainer.data import Prompt
from trainer.diagnostics import DRIFT
from trainer.evaluation import Evaluation
from trainer.models import Model, load_tokenizer

_GIB = 2**30
_PROMPTS, _SEED = 8, 1 << 32


def preflight(
    config: StageConfig, student: Model, evaluation: Evaluation, prompts: list[Prompt]
) -> list[str]:
    """A sentence for each finding; what is bad says what to do."""
    found = [_memory(config, student, evaluation)]
    if isinstance(config, TeacherConfig):
        found += _tokenizers(config, evaluation)
    if isinstance(config, DistillationConfig):
        found += _gap(config, student, evaluation, prompts)
    return found


def _memory(config: StageConfig, student: Model, evaluation: Evaluation) -> str:
    models = {id(m): m for m in [student, *(t.model for t in evaluation.local.values())]}
    parameters = {id(p): p for m in models.values() for p in m.parameters()}.values()
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


def _tokenizers(config: TeacherConfig, evaluation: Evaluation) -> list[str]:
    ours, found = evaluation.sampler.tokenizer, []
    for name in config.teachers.values():
        if name == "self" or is_server(name):
            continue
        theirs = load_tokenizer(name)
        if theirs.chat_template != ours.chat_template:
            found.append(
                f"chat template: that of {name} is another; it sees prompts in the student's, "
                "which it may not know: see that they agree, or pass chat_template_kwargs"
            )
        if theirs.eos_token_id != ours.eos_token_id:
            found.append(
                f"EOS: {name} ends by {theirs.eos_token!r}, the student by {ours.eos_token!r}; a "
                "completion ends at either, and the student learns the teacher's"
            )
    return found


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
    drops = config.tail == "drop" and config.support != "full"
    if drops and config.objective != "policy_gradient" and mass < 0.95:
        support += f". {DRIFT}"
    return [sentence, support]

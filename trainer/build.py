"""Models, teachers, samplers and trainers from a config, and checks before training."""

import psutil
import torch

from opd_trainer.config import DistillationConfig, RLVRConfig, SFTConfig, StageConfig, TeacherConfig
from opd_trainer.config.base import is_server
from opd_trainer.data import Prompt, PromptReader
from opd_trainer.measures.diagnostics import DRIFT
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import Model, Tokenizer, compare_tokenizers, limits_of, load_student
from opd_trainer.models.rollout import Sampler
from opd_trainer.models.teacher import LocalTeacher, Teacher, load_teacher, self_teacher
from opd_trainer.run.console import hide_bars_of_libraries
from opd_trainer.run.directory import claim_output_directory
from opd_trainer.stages.distillation import OnPolicyDistillationTrainer
from opd_trainer.stages.rlvr import RLVRTrainer
from opd_trainer.stages.sft import SFTTrainer, generate
from opd_trainer.stages.training import CompletionTrainer

_GIB = 2**30
_PROMPTS, _SEED = 8, 1 << 32  # of the samples before training


def prepare(config: StageConfig) -> tuple[CompletionTrainer, str | None]:
    """Return a trainer with all data checked and tokenised, and the checkpoint to resume from."""
    checkpoint = claim_output_directory(config)
    config.eval_on_start &= checkpoint is None
    student, evaluation, reader = load(config)
    prompts = reader.read(config.train_data)
    is_anchored = isinstance(config, RLVRConfig) and config.kl_coef > 0
    start = self_teacher(config, student) if is_anchored else None
    if config.preflight and checkpoint is None:
        _print_findings(config, _preflight(student, evaluation, prompts, start))
    if isinstance(config, DistillationConfig):
        return OnPolicyDistillationTrainer(student, config, prompts, evaluation), checkpoint
    if isinstance(config, RLVRConfig):
        trainer = RLVRTrainer(student, config, prompts, evaluation)
        trainer.start = start
        return trainer, checkpoint
    assert isinstance(config, SFTConfig)
    if config.generate_from == "teacher":
        prompts = generate(config, prompts, evaluation)
    elif not all(p.reference_ids for p in prompts):
        raise ValueError(f"{config.train_data}: expected a completion in every row")
    return SFTTrainer(student, config, prompts, evaluation), checkpoint


def _preflight(
    student: Model, evaluation: Evaluation, prompts: list[Prompt], start: LocalTeacher | None
) -> list[str]:
    """Return one sentence per finding, with a remedy if it is bad; `start` uses memory too."""
    config = evaluation.config
    models = [student, *(x.model for x in (*evaluation.local.values(), start) if x)]
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    weights = sum(p.nbytes for p in parameters)
    # AdamW's two moments with a gradient, or in a checkpoint with a weight.
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
        free = psutil.disk_usage(config.output_dir).free
        disk = f"disk: {states / _GIB:.1f} GiB for a checkpoint; {free / _GIB:.1f} GiB are free"
        if 2 * states > free:  # a checkpoint is removed only after the next one is whole
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


def load(config: StageConfig) -> tuple[Model, Evaluation, PromptReader]:
    """Return the student, its evaluation with the teachers, and a reader for more prompts."""
    hide_bars_of_libraries(config)
    student, tokenizer = load_student(config)
    teachers = _load_teachers(config, student, tokenizer)
    limits = {name: teacher.limits for name, teacher in teachers.items()}
    reader = PromptReader(config, tokenizer, limits_of(student), limits)
    held_out: list[Prompt] = [] if config.eval_data is None else reader.read(config.eval_data)
    local = [t.model for t in teachers.values() if isinstance(t, LocalTeacher)]
    sampler = _sampler(config)(config, tokenizer, student, *local)
    return student, Evaluation(config, held_out, teachers, sampler), reader


def _load_teachers(config: StageConfig, student: Model, tokenizer: Tokenizer) -> dict[str, Teacher]:
    """Return the teachers by the name that rows use; {} for a stage without teachers."""
    if not isinstance(config, TeacherConfig):
        return {}
    vocab_size = student.get_output_embeddings().weight.shape[0]
    if config.k > vocab_size:
        raise ValueError(f"k: expected at most the student's {vocab_size} ids, got {config.k}")
    teachers: dict[str, Teacher] = {}
    for name, model in config.teachers.items():
        if is_server(model):
            from opd_trainer.models.server import ServedTeacher

            teachers[name] = ServedTeacher(model, config, tokenizer, vocab_size, name)
        elif model == "self":
            rate = config.teacher_update_rate if isinstance(config, DistillationConfig) else 0.0
            teachers[name] = self_teacher(config, student, config.teacher_dtype, rate)
        else:
            findings = compare_tokenizers(tokenizer, model, config.trust_remote_code)
            _print_findings(config, findings)
            dtype = config.teacher_dtype or config.dtype
            teachers[name] = load_teacher(model, dtype, config)
    return teachers


def _print_findings(config: StageConfig, findings: list[str]) -> None:
    if config.preflight and config.should_save:  # on one rank
        print("".join(f"preflight: {finding}\n" for finding in findings), end="")


def _sampler(config: StageConfig) -> type[Sampler]:
    if config.rollout_engine == "transformers":
        return Sampler
    from opd_trainer.models.vllm_engine import VLLMSampler

    return VLLMSampler

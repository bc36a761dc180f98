"""Models, teachers, samplers and trainers from a config, and checks before training."""

import json
from copy import copy
from datetime import date
from pathlib import Path
from textwrap import indent

import psutil
import torch

from opd_kernels.integrations.transformers import causal_lm_of
from opd_trainer.config import (
    DistillationConfig,
    EvaluationConfig,
    RLVRConfig,
    SFTConfig,
    StageConfig,
    TeacherConfig,
)
from opd_trainer.config.base import is_server
from opd_trainer.data import Prompt, PromptReader, tell
from opd_trainer.measures.diagnostics import DRIFT
from opd_trainer.measures.evaluation import Evaluation
from opd_trainer.models.load import (
    BASE,
    Model,
    Tokenizer,
    check_vocabularies,
    compare_tokenizers,
    eos_ids_of,
    limits_of,
    load_chat_template,
    load_student,
    stop_at,
)
from opd_trainer.models.rollout import Sampler
from opd_trainer.models.teacher import LocalTeacher, Teacher, load_teacher, self_teacher
from opd_trainer.run.console import hide_bars_of_libraries
from opd_trainer.run.directory import CONFIG, claim_output_directory
from opd_trainer.stages.distillation import OnPolicyDistillationTrainer
from opd_trainer.stages.rlvr import RLVRTrainer
from opd_trainer.stages.sft import SFTTrainer, generate
from opd_trainer.stages.training import CompletionTrainer

_GIB = 2**30
_PROMPTS, _SEED = 8, 1 << 32  # of the samples before training
_SHOWN = 2000  # characters of a prompt


def prepare(config: StageConfig) -> tuple[CompletionTrainer, str | None]:
    """Return a trainer with all data checked and tokenised, and the checkpoint to resume from."""
    _set_date(config)
    checkpoint = claim_output_directory(config)
    config.eval_on_start &= checkpoint is None
    student, evaluation, reader = load(config)
    prompts = reader.read(config.train_data, learns=True)
    _show(reader, prompts)
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
    teachers, tokenizers = _load_teachers(config, student, tokenizer)
    limits = {name: teacher.limits for name, teacher in teachers.items()}
    reader = PromptReader(config, tokenizer, limits_of(student), limits, tokenizers)
    held_out: list[Prompt] = [] if config.eval_data is None else reader.read(config.eval_data)
    # A turn ends where a model stops, and where the chat template that it reads ends turns.
    templates = (reader.template, *reader.teacher_templates.values())
    stop_at(student, frozenset().union(*(x.end_ids for x in templates)))
    local = [t.model for t in teachers.values() if isinstance(t, LocalTeacher)]
    sampler = _sampler(config)(config, tokenizer, student, *local)
    # The saved student stops where it was taught to, and so does the base that a run saves.
    stop_at(student, sampler.eos_ids)
    if config.should_save and (base := Path(config.output_dir) / BASE).exists():
        causal_lm_of(student).generation_config.save_pretrained(base)
    if isinstance(config, EvaluationConfig):
        _show(reader, held_out)
    return student, Evaluation(config, held_out, teachers, sampler), reader


def _set_date(config: StageConfig) -> None:
    """Set the date that chat templates write: a resumed run keeps that of its first start."""
    if config.chat_template_date is None:
        record = Path(config.output_dir) / CONFIG
        resumes = config.resume_from_checkpoint is not None and record.exists()
        began = json.loads(record.read_text()) if resumes else {}
        config.chat_template_date = began.get("chat_template_date", date.today().isoformat())


def _show(reader: PromptReader, prompts: list[Prompt]) -> None:
    """Print one prompt as the student and each teacher read it."""
    first = {p.teacher: p for p in reversed(prompts)}
    shown = {"the student": (reader.tokenizer, prompts[0].student_ids)}
    for name, prompt in sorted(first.items()) if reader.teacher_limits else []:
        tokenizer = reader.teacher_templates[name].tokenizer
        shown[f"the teacher {name}".strip()] = tokenizer, prompt.teacher_ids
    for model, (tokenizer, ids) in shown.items():
        text = tokenizer.decode(ids)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
        tell(reader.config, f"prompt of {model}, {len(ids)} tokens:\n{indent(text, '  ')}")


def _load_teachers(
    config: StageConfig, student: Model, tokenizer: Tokenizer
) -> tuple[dict[str, Teacher], dict[str, Tokenizer]]:
    """Return the teachers, and the tokenizers of the teachers that have their own chat template.

    Both are by the name that rows use, and {} for a stage without teachers.
    """
    if not isinstance(config, TeacherConfig):
        return {}, {}
    vocab_size = student.get_output_embeddings().weight.shape[0]
    if config.k > vocab_size:
        raise ValueError(f"k: expected at most the student's {vocab_size} ids, got {config.k}")
    is_trusted, source = config.trust_remote_code, config.teacher_chat_template
    template = None
    if config.teachers and source not in ("own", "student"):
        template = load_chat_template(source, is_trusted)
    teachers: dict[str, Teacher] = {}
    tokenizers: dict[str, Tokenizer] = {}
    for name, model in config.teachers.items():
        own = tokenizer
        if is_server(model):
            from opd_trainer.models.server import ServedTeacher

            teachers[name] = ServedTeacher(model, config, tokenizer, vocab_size, name)
        elif model == "self":
            rate = config.teacher_update_rate if isinstance(config, DistillationConfig) else 0.0
            teachers[name] = self_teacher(config, student, config.teacher_dtype, rate)
        else:
            own, findings = compare_tokenizers(tokenizer, model, is_trusted)
            _print_findings(config, findings)
            dtype = config.teacher_dtype or config.dtype
            teachers[name] = teacher = load_teacher(model, dtype, config)
            check_vocabularies(student, teacher.model, (tokenizer, own), model)
            stop_at(teacher.model, eos_ids_of(teacher.model) | {own.eos_token_id})
        if template is not None:
            own = copy(own)
            own.chat_template = template
        if source != "student" and own is not tokenizer and own.chat_template is not None:
            tokenizers[name] = own
    return teachers, tokenizers


def _print_findings(config: StageConfig, findings: list[str]) -> None:
    if config.preflight and config.should_save:  # on one rank
        print("".join(f"preflight: {finding}\n" for finding in findings), end="")


def _sampler(config: StageConfig) -> type[Sampler]:
    if config.rollout_engine == "transformers":
        return Sampler
    from opd_trainer.models.vllm_engine import VLLMSampler

    return VLLMSampler

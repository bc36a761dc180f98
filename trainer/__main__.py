"""python -m trainer STAGE RECIPE.yaml [--key value ...], or opd-train: run a recipe."""

import argparse
import json
import sys
from pathlib import Path

from yaml import YAMLError

from trainer import models
from trainer.checkpoint import METRICS, claim_output_directory, publish
from trainer.config import (
    DistillationConfig,
    EvaluationConfig,
    RLVRConfig,
    SFTConfig,
    StageConfig,
    TeacherConfig,
    is_server,
    load_config,
)
from trainer.data import Prompt, PromptReader
from trainer.distillation import OnPolicyDistillationTrainer
from trainer.evaluation import Evaluation
from trainer.models import Model
from trainer.preflight import preflight
from trainer.report import before_after, plot_curves, write_report
from trainer.rlvr import RLVRTrainer
from trainer.rollout import Sampler
from trainer.sft import SFTTrainer, generate
from trainer.teacher import LocalTeacher, Teacher, TeacherError, load_teacher, self_teacher
from trainer.training import CompletionTrainer

STAGES: dict[str, tuple[type[StageConfig], str]] = {
    "sft": (SFTConfig, "supervised fine-tuning, on the data's completions or a teacher's"),
    "rlvr": (RLVRConfig, "reinforcement learning from verifiable rewards"),
    "distill": (DistillationConfig, "on-policy distillation"),
    "evaluate": (EvaluationConfig, "measure a model on held-out prompts"),
}


def main(argv: list[str] | None = None) -> None:
    """The command line; a mistake of the user's ends it with one line on stderr."""
    parser = argparse.ArgumentParser(prog="opd-train", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="stage")
    for name, (_, description) in STAGES.items():
        command = commands.add_parser(name, help=description)
        command.add_argument(
            "recipe", type=Path, help="a YAML file; --key value overrides a key of it"
        )
    command = commands.add_parser("report", help="one HTML page of several runs")
    command.add_argument("runs", type=Path, nargs="+", help="a recipe's output_dir")
    command.add_argument("--output", type=Path, default=Path("report.html"))
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if arguments.stage == "report":
            write_report(arguments.runs, arguments.output)
            return print(arguments.output)
        config = load_config(STAGES[arguments.stage][0], arguments.recipe, overrides)
        if isinstance(config, EvaluationConfig):
            return evaluate(config)
        prepared = prepare(config)
    except (OSError, ValueError, YAMLError) as error:
        sys.exit(f"error: {error}")
    try:
        train(*prepared)
    except TeacherError as error:
        sys.exit(f"error: {error}")


def prepare(config: StageConfig) -> tuple[CompletionTrainer, str | None]:
    """A recipe's trainer and the checkpoint to resume from, everything checked and tokenised."""
    checkpoint = claim_output_directory(config)
    student, evaluation, reader = load(config)
    prompts, teachers = reader.read(config.train_data), evaluation.teachers
    student.to(config.device)
    for teacher in evaluation.local.values():
        teacher.model.to(config.device)
    if config.preflight and checkpoint is None:
        for finding in preflight(config, student, evaluation, prompts):
            print(f"preflight: {finding}")
    if isinstance(config, DistillationConfig):
        return OnPolicyDistillationTrainer(student, config, prompts, evaluation), checkpoint
    if isinstance(config, RLVRConfig):
        start = self_teacher(config, student) if config.kl_coef > 0 else None
        return RLVRTrainer(student, config, prompts, evaluation, start), checkpoint
    assert isinstance(config, SFTConfig)
    if config.generate_from == "teacher":
        prompts = generate(config, prompts, teachers, evaluation.sampler)
    elif not all(p.reference_ids for p in prompts):
        raise ValueError(f"{config.train_data}: expected a completion in every row")
    return SFTTrainer(student, config, prompts, evaluation), checkpoint


def load(config: StageConfig) -> tuple[Model, Evaluation, PromptReader]:
    """The student, its held-out evaluation with the teachers, and what reads more prompts."""
    tokenizer = models.load_tokenizer(config.model)
    student = models.with_lora(models.load_model(config.model, config.dtype), config)
    teachers: dict[str, Teacher] = {}
    if isinstance(config, TeacherConfig):
        teachers = {name: _teacher(x, config, student) for name, x in config.teachers.items()}
        for name in config.teachers.values():
            if name != "self" and not is_server(name):
                models.check_same_tokenizer(tokenizer, name)
    contexts = {name: teacher.context for name, teacher in teachers.items()}
    reader = PromptReader(config, tokenizer, models.context_length(student), contexts)
    held_out: list[Prompt] = [] if config.eval_data is None else reader.read(config.eval_data)
    local = [t.model for t in teachers.values() if isinstance(t, LocalTeacher)]
    sampler = _sampler(config)(config, tokenizer, student, *local)
    return student, Evaluation(config, held_out, teachers, sampler), reader


def _sampler(config: StageConfig) -> type[Sampler]:
    if config.rollout_engine == "transformers":
        return Sampler
    from trainer.vllm_engine import VLLMSampler

    return VLLMSampler


def _teacher(name: str, config: TeacherConfig, student: Model) -> Teacher:
    if is_server(name):
        from trainer.server import ServedTeacher

        return ServedTeacher(name, config, student.get_output_embeddings().weight.shape[0])
    if name == "self":
        moves = isinstance(config, DistillationConfig)
        rate = config.teacher_update_rate if moves else 0.0
        return self_teacher(config, student, config.teacher_dtype, rate)
    return load_teacher(name, config.teacher_dtype or config.dtype)


def train(trainer: CompletionTrainer, checkpoint: str | None) -> None:
    """Train; then save the student and what there is to look at."""
    trainer.train(resume_from_checkpoint=checkpoint)
    state, folder = trainer.state, Path(trainer.args.output_dir)
    if trainer.interruption.requested:
        print(f"stopped at step {state.global_step}; go on with --resume_from_checkpoint auto")
        sys.exit(130)
    measured = [line["step"] for line in state.log_history if "eval_truncated" in line]
    if state.global_step not in measured:
        trainer.evaluate()
    trainer.save_model(f"{folder}/.saving")
    if not trainer.is_world_process_zero():
        return
    publish(folder / ".saving", folder / "model")
    plot_curves(folder)
    if trainer.evaluation.prompts:
        print(f"\n{before_after(folder)}")
    print(f"student: {folder}/model   curves: {folder}/curves.png   log: {folder}/{METRICS}")


def evaluate(config: EvaluationConfig) -> None:
    """Measure a model; the figures go to evaluation.json too."""
    student, evaluation, _ = load(config)
    student.to(config.device)
    for teacher in evaluation.local.values():
        teacher.model.to(config.device)
    metrics, folder = evaluation.measure(student, step=0), Path(config.output_dir)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1))
    print("\n".join(f"{name.removeprefix('eval_'):34} {x:.4g}" for name, x in metrics.items()))
    print(f"figures: {folder}/evaluation.json   samples: {folder}/samples")


if __name__ == "__main__":
    main()

"""python -m trainer STAGE RECIPE.yaml [--key value ...], or opd-train: run a recipe."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

from trainer import models
from trainer.checkpoint import SavingError
from trainer.config import (
    DistillationConfig,
    EvaluationConfig,
    RLVRConfig,
    SFTConfig,
    StageConfig,
    TeacherConfig,
    is_server,
)
from trainer.data import Prompt, PromptReader
from trainer.distillation import OnPolicyDistillationTrainer
from trainer.evaluation import Evaluation
from trainer.models import Model
from trainer.preflight import preflight
from trainer.recipe import load_config
from trainer.report import before_after, plot_curves, write_report
from trainer.rlvr import RLVRTrainer
from trainer.rollout import Sampler
from trainer.run_directory import METRICS, claim_output_directory, write_whole
from trainer.sft import SFTTrainer, generate
from trainer.stopping import RunStoppedError
from trainer.teacher import LocalTeacher, Teacher, load_teacher, self_teacher
from trainer.training import CompletionTrainer

STAGES: dict[str, tuple[type[StageConfig], str]] = {
    "sft": (SFTConfig, "supervised fine-tuning, on the data's completions or a teacher's"),
    "rlvr": (RLVRConfig, "reinforcement learning from verifiable rewards"),
    "distill": (DistillationConfig, "on-policy distillation"),
    "evaluate": (EvaluationConfig, "measure a model on held-out prompts"),
}


EXTRAS = {  # of modules that are imported where a recipe asks for them
    "openai": "'opd-kernels[server]'",
    "math_verify": "'opd-kernels[rewards]'",
    "reasoning_gym": "'opd-kernels[rewards]'",
    "vllm": "vllm, in an environment of its own; `make test-vllm` shows how",
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
        if arguments.stage != "report":
            return run(STAGES[arguments.stage][0], arguments.recipe, overrides)
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        write_report(arguments.runs, arguments.output)
        print(arguments.output)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"error: {error}; pip install {EXTRAS[error.name]}")
    except RunStoppedError as error:  # by the last measurement
        sys.exit(f"error: {error}")
    except (OSError, ValueError) as error:
        if arguments.stage != "report":
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


def run(stage: type[StageConfig], recipe: Path, overrides: list[str]) -> None:
    """A stage, from its recipe to what it leaves."""
    try:
        config = load_config(stage, recipe, overrides)
        if isinstance(config, EvaluationConfig):
            return evaluate(config)
        prepared = prepare(config)
    except (OSError, ValueError, RunStoppedError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    train(*prepared)


def prepare(config: StageConfig) -> tuple[CompletionTrainer, str | None]:
    """A recipe's trainer and the checkpoint to resume from, everything checked and tokenised."""
    checkpoint = claim_output_directory(config)
    config.eval_on_start &= checkpoint is None
    student, evaluation, reader = load(config)
    prompts = reader.read(config.train_data)
    start = None
    if isinstance(config, RLVRConfig) and config.kl_coef > 0:
        start = self_teacher(config, student)
    if config.preflight and checkpoint is None:
        others = [] if start is None else [start.model]
        _tell(config, preflight(config, student, evaluation, prompts, *others))
    if isinstance(config, DistillationConfig):
        return OnPolicyDistillationTrainer(student, config, prompts, evaluation), checkpoint
    if isinstance(config, RLVRConfig):
        return RLVRTrainer(student, config, prompts, evaluation, start), checkpoint
    assert isinstance(config, SFTConfig)
    if config.generate_from == "teacher":
        prompts = generate(config, prompts, evaluation)
    elif not all(p.reference_ids for p in prompts):
        raise ValueError(f"{config.train_data}: expected a completion in every row")
    return SFTTrainer(student, config, prompts, evaluation), checkpoint


def load(config: StageConfig) -> tuple[Model, Evaluation, PromptReader]:
    """The student, its held-out evaluation with the teachers, and what reads more prompts."""
    split, trusted = config.distributed_config, config.trust_remote_code
    tokenizer = models.load_tokenizer(config.model, trusted)
    student = models.load_model(config.model, config.dtype, split, trusted)
    models.check_special_tokens(tokenizer, student)
    student = models.with_lora(student, config)
    if not split:
        student.to(config.device)
    teachers: dict[str, Teacher] = {}
    if isinstance(config, TeacherConfig):
        vocab_size = student.get_output_embeddings().weight.shape[0]
        if config.k > vocab_size:
            raise ValueError(f"k: expected at most the student's {vocab_size} ids, got {config.k}")
        for name, model in config.teachers.items():
            if is_server(model):
                from trainer.server import ServedTeacher

                teachers[name] = ServedTeacher(model, config, tokenizer, vocab_size, name)
            elif model == "self":
                moves = isinstance(config, DistillationConfig)
                rate = config.teacher_update_rate if moves else 0.0
                teachers[name] = self_teacher(config, student, config.teacher_dtype, rate)
            else:
                _tell(config, models.compare_tokenizers(tokenizer, model, trusted))
                dtype = config.teacher_dtype or config.dtype
                teachers[name] = load_teacher(model, dtype, config)
    limits = {name: teacher.limits for name, teacher in teachers.items()}
    reader = PromptReader(config, tokenizer, models.Limits.of(student), limits)
    held_out: list[Prompt] = [] if config.eval_data is None else reader.read(config.eval_data)
    local = [t.model for t in teachers.values() if isinstance(t, LocalTeacher)]
    sampler = _sampler(config)(config, tokenizer, student, *local)
    return student, Evaluation(config, held_out, teachers, sampler), reader


def _tell(config: StageConfig, findings: list[str]) -> None:
    if config.preflight and config.should_save:  # one of the ranks
        print("".join(f"preflight: {finding}\n" for finding in findings), end="")


def _sampler(config: StageConfig) -> type[Sampler]:
    if config.rollout_engine == "transformers":
        return Sampler
    from trainer.vllm_engine import VLLMSampler

    return VLLMSampler


def train(trainer: CompletionTrainer, checkpoint: str | None) -> None:
    """Train; then save the student and what there is to look at."""
    folder = Path(trainer.args.output_dir)
    resumes = not trainer.args.distributed_config
    go_on = "; go on with --resume_from_checkpoint auto" if resumes else ""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if not trainer.interruption.stopped:
            student = trainer.save_student()
    except (RunStoppedError, OSError) as error:
        with suppress(SavingError):  # for which there was no room before
            trainer.save_last_step()
        sys.exit(f"error: {error}{go_on}")
    state = trainer.state
    if trainer.interruption.stopped:
        kept = f"; the student as it is: {folder}/checkpoint-{state.global_step}"
        print(f"stopped at step {state.global_step}{go_on or kept}")
        sys.exit(130)
    measured = [line["step"] for line in state.log_history if "eval_truncated" in line]
    if state.global_step not in measured:
        trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    plot_curves(folder)
    if trainer.evaluation.prompts:
        print(f"\n{before_after(folder)}")
    print(f"student: {student}   curves: {folder}/curves.png   log: {folder}/{METRICS}")


def evaluate(config: EvaluationConfig) -> None:
    """Measure a model; what is left is a run without a step."""
    claim_output_directory(config)
    student, evaluation, _ = load(config)
    metrics = evaluation.measure(student, step=0)
    if config.should_save:  # one of the ranks, which all measure the same
        path = Path(config.output_dir) / METRICS
        write_whole(path, json.dumps(metrics | {"step": 0}) + "\n")
        print("\n".join(f"{name.removeprefix('eval_'):34} {x:.4g}" for name, x in metrics.items()))
        print(f"figures: {path}   samples: {path.parent}/samples")


if __name__ == "__main__":
    main()

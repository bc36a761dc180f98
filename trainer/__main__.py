"""python -m opd_trainer STAGE RECIPE.yaml [--key value ...], or opd-train: run a recipe."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from opd_trainer.build import load, prepare
from opd_trainer.config import (
    DistillationConfig,
    EvaluationConfig,
    RLVRConfig,
    SFTConfig,
    StageConfig,
)
from opd_trainer.config.recipe import load_config
from opd_trainer.errors import RunStoppedError, SavingError
from opd_trainer.run.directory import METRICS, claim_output_directory, write_whole
from opd_trainer.run.report import Run, before_after, held_out_changes, plot_curves, write_report
from opd_trainer.stages.training import CompletionTrainer

STAGES: dict[str, tuple[type[StageConfig], str]] = {
    "sft": (SFTConfig, "supervised fine-tuning, on the data's completions or a teacher's"),
    "rlvr": (RLVRConfig, "reinforcement learning from verifiable rewards"),
    "distill": (DistillationConfig, "on-policy distillation"),
    "evaluate": (EvaluationConfig, "measure a model on held-out prompts"),
}
EXTRAS = {  # what to install for modules that are imported only if a config needs them
    "openai": "'opd-kernels[server]'",
    "math_verify": "'opd-kernels[rewards]'",
    "reasoning_gym": "'opd-kernels[rewards]'",
    "vllm": "vllm, in an environment of its own; `make test-vllm` shows how",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line on stderr."""
    parser = argparse.ArgumentParser(prog="opd-train", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="stage")
    for name, (_, description) in STAGES.items():
        command = commands.add_parser(name, help=description)
        command.add_argument("recipe", type=Path, help="a YAML file; --key value overrides a key")
    command = commands.add_parser("report", help="one HTML page of several runs")
    command.add_argument("runs", type=Path, nargs="+", help="a recipe's output_dir")
    command.add_argument("--output", type=Path, default=Path("report.html"))
    arguments, overrides = parser.parse_known_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may not know all characters of a model
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _exit_on(OSError, ValueError, RunStoppedError):
            if arguments.stage == "report":
                if overrides:
                    parser.error(f"unrecognized arguments: {' '.join(overrides)}")
                write_report(arguments.runs, arguments.output)
                return print(arguments.output)
            config = load_config(STAGES[arguments.stage][0], arguments.recipe, overrides)
            if isinstance(config, EvaluationConfig):
                return evaluate(config)
            trainer, checkpoint = prepare(config)
        with _exit_on(RunStoppedError):  # from the last evaluation
            train(trainer, checkpoint)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"error: {error}; pip install {EXTRAS[error.name]}")


@contextmanager
def _exit_on(*errors: type[Exception]) -> Iterator[None]:
    """End the program with the error's message in one line."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def train(trainer: CompletionTrainer, checkpoint: str | None) -> None:
    """Train; then save the student, evaluate it and write the report."""
    folder = Path(trainer.args.output_dir)
    resumes = not trainer.args.distributed_config
    go_on = "; go on with --resume_from_checkpoint auto" if resumes else ""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if not trainer.interruption.stopped:
            student = trainer.save_student()
    except (RunStoppedError, OSError) as error:
        trainer.console.close()
        with suppress(SavingError):  # the disk may be full
            trainer.save_last_step()
        sys.exit(f"error: {error}{go_on}")
    state = trainer.state
    if trainer.interruption.stopped:
        kept = f"; the current student: {folder}/checkpoint-{state.global_step}"
        print(f"stopped at step {state.global_step}{go_on or kept}")
        sys.exit(130)
    measured = [line["step"] for line in state.log_history if "eval_truncated" in line]
    if state.global_step not in measured:
        trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    plot_curves(folder)
    print(f"student: {student}\ncurves: {folder}/curves.png\nlog: {folder}/{METRICS}")
    if trainer.evaluation.prompts:
        before_after(folder)
        print(f"report: {folder}/report.md")
        trainer.console.print_changes(held_out_changes(Run(folder)))


def evaluate(config: EvaluationConfig) -> None:
    """Evaluate a model and write its metrics, as a run without steps."""
    claim_output_directory(config)
    student, evaluation, _ = load(config)
    metrics = evaluation.measure(student, step=0)
    if config.should_save:  # all ranks have the same metrics, and one writes them
        path = Path(config.output_dir) / METRICS
        write_whole(path, json.dumps(metrics | {"step": 0}) + "\n")
        print("\n".join(f"{name.removeprefix('eval_'):34} {x:.4g}" for name, x in metrics.items()))
        print(f"metrics: {path}   samples: {path.parent}/samples")


if __name__ == "__main__":
    main()

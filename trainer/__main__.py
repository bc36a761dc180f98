"""python -m opd_trainer STAGE RECIPE.yaml [--key value ...], or opd-train: run a recipe.

What a stage needs is imported only once its recipe has been read, because the imports take seconds.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from opd_trainer.command.examples import write_examples
from opd_trainer.command.keys import STAGES
from opd_trainer.command.line import parse
from opd_trainer.errors import RunStoppedError, SavingError
from opd_trainer.run import METRICS, check_run

if TYPE_CHECKING:
    from opd_trainer.config import EvaluationConfig
    from opd_trainer.stages.training import CompletionTrainer

_TRAINER = (
    "accelerate", "datasets", "filelock", "gguf", "huggingface_hub", "jinja2", "markupsafe",
    "matplotlib", "numpy", "pandas", "peft", "psutil", "pydantic", "rich", "safetensors", "tqdm",
    "transformers", "typing_extensions", "yaml",
)  # fmt: skip
EXTRAS = dict.fromkeys(_TRAINER, "'opd-kernels[trainer]'") | {
    "httpx2": "'opd-kernels[server]'",
    "openai": "'opd-kernels[server]'",
    "math_verify": "'opd-kernels[rewards]'",
    "reasoning_gym": "'opd-kernels[rewards]'",
    "vllm": "vllm, in an environment of its own; `make test-vllm` shows how",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line on stderr."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may not know all characters of a model
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _exit_on(OSError, ValueError, RunStoppedError):
            prepared = _prepare(sys.argv[1:] if argv is None else argv)
        if prepared:
            with _exit_on(RunStoppedError):  # from the last evaluation
                train(*prepared)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("opd_kernels", "opd_trainer"):
            raise
        sys.exit(f"error: {error}; pip install {EXTRAS.get(package, package)}")
    except ImportError as error:  # of transformers, which names the package
        sys.exit(f"error: {_one_line(error)}")


def _prepare(words: list[str]) -> "tuple[CompletionTrainer, str | None] | None":
    """Run a command; of a stage that trains, return the trainer and the checkpoint instead."""
    arguments, texts = parse(words)
    if arguments.command == "init":
        return print(write_examples(arguments.directory))
    if arguments.command == "report":
        for run in arguments.runs:
            check_run(run)
        from opd_trainer.run.report import write_report

        write_report(arguments.runs, arguments.output)
        return print(arguments.output)
    from opd_trainer.command.recipe import read_recipe

    values = read_recipe(arguments.command, arguments.recipe, texts)
    from opd_trainer.config import EvaluationConfig, stages

    config = getattr(stages, STAGES[arguments.command])(**values)
    from opd_trainer.build import prepare
    from opd_trainer.requirements import check_requirements

    check_requirements(config)
    if isinstance(config, EvaluationConfig):
        evaluate(config)
        return None
    return prepare(config)


@contextmanager
def _exit_on(*errors: type[Exception]) -> Iterator[None]:
    """End the program with the error's message in one line."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def train(trainer: "CompletionTrainer", checkpoint: str | None) -> None:
    """Train; then save the student, evaluate it and write the report."""
    from opd_trainer.run.hub import push_student
    from opd_trainer.run.report import Run, before_after, held_out_changes, plot_curves

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
    except (ImportError, TypeError, ValueError) as error:
        if trainer.interruption.has_begun:
            raise
        sys.exit(f"error: training could not start; {type(error).__name__}: {_one_line(error)}")
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
    if trainer.args.push_to_hub:
        push_student(trainer, student)


def evaluate(config: "EvaluationConfig") -> None:
    """Evaluate a model and write its metrics, as a run without steps."""
    from opd_trainer.build import load
    from opd_trainer.run.directory import claim_output_directory, write_whole

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

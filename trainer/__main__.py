"""python -m trainer distill RECIPE.yaml [--key value ...], or opd-train: run a recipe."""

import argparse
import sys
from pathlib import Path

from yaml import YAMLError

from trainer import models
from trainer.checkpoint import METRICS, claim_output_directory, publish
from trainer.config import DistillationConfig, load_config
from trainer.data import PromptReader
from trainer.distillation import OnPolicyDistillationTrainer
from trainer.evaluation import Evaluation
from trainer.report import before_after, plot_curves
from trainer.rollout import Sampler
from trainer.teacher import load_teacher


def main(argv: list[str] | None = None) -> None:
    """The command line; a mistake of the user's ends it with one line on stderr."""
    parser = argparse.ArgumentParser(prog="opd-train", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("distill", help="on-policy distillation")
    command.add_argument("recipe", type=Path, help="a YAML file; --key value overrides a key of it")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        distill(load_config(arguments.recipe, overrides))
    except (OSError, ValueError, YAMLError) as error:
        sys.exit(f"error: {error}")


def distill(config: DistillationConfig) -> None:
    """Run a recipe; everything is checked and tokenised before the first rollout."""
    checkpoint = claim_output_directory(config)
    tokenizer = models.load_tokenizer(config.model)
    if config.teacher != "self":
        models.check_same_tokenizer(
            tokenizer, models.load_tokenizer(config.teacher), config.teacher
        )
    student = models.with_lora(models.load_model(config.model, config.dtype), config)
    teacher = load_teacher(config, student)
    contexts = models.context_length(student), models.context_length(teacher.model)
    reader = PromptReader(config, tokenizer, contexts)
    prompts = reader.read(config.train_data)
    held_out = [] if config.eval_data is None else reader.read(config.eval_data)
    sampler = Sampler(config, tokenizer, student, teacher.model)
    evaluation = Evaluation(config, held_out, teacher, sampler)
    trainer = OnPolicyDistillationTrainer(student, config, prompts, evaluation)
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if (state.global_step, True) not in [
        (x["step"], "eval_overlap" in x) for x in state.log_history
    ]:
        trainer.evaluate()
    finish(trainer)


def finish(trainer: OnPolicyDistillationTrainer) -> None:
    """Save the student and what there is to look at."""
    run = Path(trainer.args.output_dir)
    trainer.save_model(f"{run}/.saving")
    if not trainer.is_world_process_zero():
        return
    publish(run / ".saving", run / "model")
    plot_curves(run)
    if trainer.evaluation.prompts:
        print(f"\n{before_after(run)}")
    print(f"student: {run}/model   curves: {run}/curves.png   log: {run}/{METRICS}")


if __name__ == "__main__":
    main()

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
        trainer, checkpoint = prepare(load_config(arguments.recipe, overrides))
    except (OSError, ValueError, YAMLError) as error:
        sys.exit(f"error: {error}")
    train(trainer, checkpoint)


def prepare(config: DistillationConfig) -> tuple[OnPolicyDistillationTrainer, str | None]:
    """A recipe's trainer and the checkpoint to resume from, everything checked and tokenised."""
    checkpoint = claim_output_directory(config)
    tokenizer = models.load_tokenizer(config.model)
    if config.teacher != "self":
        models.check_same_tokenizer(tokenizer, config.teacher)
    student = models.with_lora(models.load_model(config.model, config.dtype), config)
    teacher = load_teacher(config, student)
    contexts = models.context_length(student), models.context_length(teacher.model)
    reader = PromptReader(config, tokenizer, contexts)
    prompts = reader.read(config.train_data)
    held_out = [] if config.eval_data is None else reader.read(config.eval_data)
    sampler = Sampler(config, tokenizer, student, teacher.model)
    evaluation = Evaluation(config, held_out, teacher, sampler)
    return OnPolicyDistillationTrainer(student, config, prompts, evaluation), checkpoint


def train(trainer: OnPolicyDistillationTrainer, checkpoint: str | None) -> None:
    """Train; then save the student and what there is to look at."""
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if state.global_step not in [x["step"] for x in state.log_history if "eval_overlap" in x]:
        trainer.evaluate()
    folder = Path(trainer.args.output_dir)
    trainer.save_model(f"{folder}/.saving")
    if not trainer.is_world_process_zero():
        return
    publish(folder / ".saving", folder / "model")
    plot_curves(folder)
    if trainer.evaluation.prompts:
        print(f"\n{before_after(folder)}")
    print(f"student: {folder}/model   curves: {folder}/curves.png   log: {folder}/{METRICS}")


if __name__ == "__main__":
    main()

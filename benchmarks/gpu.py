"""Everything that needs a GPU in one run: tuning, the tests, the comparisons; and its report.

`make gpu` calls it. The report goes to benchmarks/results/gpu-NAME.md, to be committed.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import backends, compare, tune
from benchmarks.problems import HEADS, Problem
from benchmarks.providers import DISTILLATION, LABELS
from opd_kernels.backends.triton import configs

RESULTS = Path(__file__).parent / "results"
TOKENS = (512, 8_192)


def describe(device: torch.device) -> str:
    """The GPU and the software, in a line."""
    import triton

    gpu = torch.cuda.get_device_properties(device)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return (
        f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, CUDA "
        f"{torch.version.cuda}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    )


def run_tests() -> tuple[bool, str]:
    """The test suite with its tensors on the GPU: whether it passed, and its last lines."""
    environment = os.environ | {"OPD_TEST_DEVICE": "cuda"}
    command = [sys.executable, "-m", "pytest", "tests", "-m", "not slow", "-q"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode == 0, "\n".join(result.stdout.splitlines()[-40:])


def report(machine: str, passed: bool, tests: str, tables: list[str]) -> str:
    """Markdown."""
    verdict = "passed" if passed else "FAILED"
    sections = [f"# {machine}", f"Tests on the device: {verdict}.\n\n```\n{tests}\n```", *tables]
    return "\n\n".join(sections) + "\n"


def file_name(gpu: str) -> str:
    """gpu-NAME.md for a device's name."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.md"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gpu", help="tuning, tests and comparison on this GPU")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-tuning", action="store_true", help="keep configs.json as it is")
    parser.add_argument("--no-tests", action="store_true")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run all of it and write the report."""
    if not torch.cuda.is_available():
        sys.exit(
            "gpu: PyTorch sees no GPU; install a CUDA build of torch 2.8 or newer, and its Triton"
        )
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
        sys.exit("gpu: the tests failed on this device; the report has their end")

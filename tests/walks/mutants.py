"""Mutants of the objectives and the operators: what the tests do not notice.

    make mutants

Each mutant changes one operator, comparison, condition or number of a module, and runs the tests of
that module. It is killed when one of them fails. The walk writes docs/mutants.md with those that
survived, and ends with status 1 if fewer than LEAST are killed.
"""

import argparse
import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

LEAST = 0.9  # of the mutants
SECONDS = 240  # for the tests of one; a mutant that takes longer is killed
TESTS = {
    "divergences": "test_divergences test_divergences_optima test_sparse_logits loss/test_supports",
    "linear.operators": (
        "linear/test_operators linear/test_operators_numbers test_lazy_logits loss/test_compile"
    ),
}
# The other backends' tests of the same operators would only take longer.
SELECTION = "not triton and not cuda and not cpu"

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    line: int
    change: str
    source: str


def mutants_of(module: str) -> list[Mutant]:
    """Every change of a module's code; annotations, messages and docstrings stay."""
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    found = []
    for number in range(len(_changes(tree))):
        changed = copy.deepcopy(tree)
        node, change = _changes(changed)[number]
        before = _shown(node)
        change(node)
        label = f"{before} -> {_shown(node)}"
        found.append(Mutant(module, node.lineno, label, ast.unparse(changed)))
    return found


def _changes(tree: ast.AST) -> list[tuple[Any, Callable[[Any], None]]]:
    """Nodes, and what changes each in place."""
    found: list[tuple[Any, Callable[[Any], None]]] = []
    for node in _code(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
            found.append((node, _swap_operator))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            found.append((node, _swap_comparison))
        elif isinstance(node, ast.If | ast.IfExp):
            found.append((node, _negate))
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            found.append((node, _change_value))
    return found


def _swap_operator(node: Any) -> None:
    node.op = _SWAPS[type(node.op)]()


def _swap_comparison(node: Any) -> None:
    node.ops[0] = _SWAPS[type(node.ops[0])]()


def _negate(node: Any) -> None:
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _change_value(node: Any) -> None:
    node.value = not node.value if isinstance(node.value, bool) else node.value + 1


def _shown(node: Any) -> str:
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(node).split())


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What runs: no annotation, decorator, error or text."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield child
                yield from _code(child)


def _path(module: str) -> Path:
    return Path("opd_kernels", *module.split(".")).with_suffix(".py")


class _Loader(importlib.machinery.SourceFileLoader):
    """The mutant instead of the file."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(f"opd_kernels.{mutant.module}", str(_path(mutant.module).resolve()))
        self.mutant = mutant

    def get_code(self, fullname: str) -> Any:
        return compile(self.mutant.source, self.path, "exec")


class _Finder:
    """Finds the mutated module before the others are asked."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != f"opd_kernels.{self.mutant.module}":
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(self.mutant))


def run_tests(mutant: Mutant) -> None:
    """In a process of its own, which ends with pytest's status; nothing of ours is imported yet."""
    torch.set_num_threads(1)
    sys.meta_path.insert(0, _Finder(mutant))
    files = [f"tests/{name}.py" for name in TESTS[mutant.module].split()]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", SELECTION]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = pytest.main([*options, *files])
    os._exit(int(status))


def survives(mutant: Mutant) -> bool:
    """Whether its tests pass, within the time."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(mutant,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help=", ".join(TESTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    for module in given.modules:  # or every mutant would seem to be killed
        source = _path(module).read_text(encoding="utf-8")
        if not survives(Mutant(module, 0, "no change", ast.unparse(ast.parse(source)))):
            sys.exit(f"the tests of {module} fail without a mutant")
    mutants = [mutant for module in given.modules for mutant in mutants_of(module)]
    with ThreadPool(given.workers) as pool:  # each thread waits for a process
        results = list(tqdm(pool.imap(survives, mutants), total=len(mutants)))
    survivors = [x for x, survived in zip(mutants, results, strict=True) if survived]
    page = table(mutants, survivors)
    print(page)
    if given.modules == list(TESTS):
        Path("docs/mutants.md").write_text(page, encoding="utf-8")
    sys.exit(0 if len(survivors) <= (1 - LEAST) * len(mutants) else 1)


def table(mutants: list[Mutant], survivors: list[Mutant]) -> str:
    """Markdown: how many were killed, and those that were not."""
    killed = len(mutants) - len(survivors)
    lines = [
        "# Mutants",
        "",
        f"Made by `make mutants`: {len(mutants)} changes of one operator, comparison, condition or "
        f"number in {' and '.join(f'`{_path(m)}`' for m in TESTS)}, of which the tests "
        f"notice {killed}, {killed / len(mutants):.0%}. Those that they do not:",
        "",
        "| module | line | change |",
        "|---|---|---|",
    ]
    for mutant in survivors:
        change = mutant.change.replace("|", "\\|")[:160]
        lines.append(f"| {mutant.module} | {mutant.line} | `{change}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

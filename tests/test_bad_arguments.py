"""Every parameter of every public function, method and constructor refuses wrong values. All error
messages have the form "argument: expected ..., got ...".
"""

import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from torch import distributed

from tests import bad_arguments, bad_integration_arguments
from tests.bad_arguments import Reported

CASES = bad_arguments.CASES | bad_integration_arguments.CASES
DOCS = Path(__file__).parents[1] / "docs"
FORM = re.compile(r"(\w+(?:, \w+)*): .*\bexpected\b.*\bgot\b", re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one rank, for VocabShard and DTensors."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def rows():
    for path, case in CASES.items():
        for parameter, values in case.bad.items():
            for number, value in enumerate(values):
                yield pytest.param(path, parameter, value, id=f"{path}-{parameter}-{number}")


@pytest.mark.parametrize(("path", "parameter", "value"), list(rows()))
def test_a_wrong_value_is_refused_by_its_name(path, parameter, value):
    case = CASES[path]
    by, value = (value.by, value.value) if isinstance(value, Reported) else (parameter, value)
    # Indexing must raise IndexError outside the leading shape, since that ends an iteration.
    errors = (
        (TypeError, ValueError, IndexError) if parameter == "index" else (TypeError, ValueError)
    )
    with pytest.raises(errors) as error:
        case.call(**case.good() | {parameter: value})
    message = FORM.match(str(error.value))
    assert message, str(error.value)
    assert by in message[1].split(", "), str(error.value)


@pytest.mark.parametrize("path", CASES)
def test_right_values_are_taken(path):
    CASES[path].call(**CASES[path].good())


def public():
    """Yield the paths in the package of all names in the API reference, and of listed members."""
    pattern = r"^::: opd_kernels\.([\w.]+)\n((?:    .*\n)*)"
    for page in ("api.md", "integrations.md"):
        for path, options in re.findall(pattern, (DOCS / page).read_text() + "\n", re.MULTILINE):
            owner = pkgutil.resolve_name(f"opd_kernels.{path}")
            if not inspect.ismodule(owner):
                yield path
            members = re.search(r"members: \[(.*)\]", options)
            for name in members[1].split(", ") if members else []:
                member = inspect.getattr_static(owner, name)
                if not isinstance(member, property) and hasattr(owner, name):
                    yield f"{path}.{name}"
    yield "backends.select_backend"


def test_every_public_parameter_has_a_row():
    paths = set(public())
    for path in list(paths):
        owner = pkgutil.resolve_name(f"opd_kernels.{path}")
        if inspect.isclass(owner) and "forward" in vars(owner):
            paths.add(f"{path}.forward")
    assert paths == set(CASES)
    for path in paths:
        function = pkgutil.resolve_name(f"opd_kernels.{path}")
        parameters = set(inspect.signature(function).parameters) - {"self"}
        case = CASES[path]
        assert parameters == {*case.bad, *case.right}, path
        assert not case.bad.keys() & case.right.keys(), path
        assert all(case.bad.values()), path

"""The layers of the trainer: a module imports only from its own folder and from those below it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trainer"
LAYERS = (
    "errors", "command", "config", "data", "run", "models", "measures", "stages", "requirements",
    "build", "__main__",
)  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
}


def imported_modules(name):
    """Return the names, without "opd_trainer.", of the trainer's modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_trainer"):
            assert node.module != "opd_trainer", (
                f"{name}: import from a module, not from the package"
            )
            found.add(node.module.removeprefix("opd_trainer."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {x.removeprefix("opd_trainer.") for x in names if x.startswith("opd_trainer.")}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_no_higher_layer(name):
    allowed = LAYERS[: LAYERS.index(name.partition(".")[0]) + 1]
    for other in imported_modules(name):
        assert other in MODULES, f"{name} imports {other}, which is no module of the trainer"
        assert other.partition(".")[0] in allowed, f"{name} imports {other} of a higher layer"


def test_no_modules_import_each_other():
    TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()

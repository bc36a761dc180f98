"""The layers of opd_kernels: a lower one imports no higher one, and no import goes in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opd_kernels"
# From the bottom up. What stands in one line may not import from one another.
LAYERS = [
    {"backends", "checks", "derivatives"},
    {"sparse_logits"},
    {"divergences", "parallel"},
    {"linear"},
    {"lazy_logits"},
    {"loss"},
    {"integrations", "memory", "opd_kernels"},  # the last one is opd_kernels/__init__.py
]


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((root.name, *(part for part in parts if part != "__init__")))


def imports_of(path, modules, package):
    """The modules of a package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == package}
    return found


def import_graph(root):
    """The modules that each module of a package imports from it."""
    paths = {module_of(path, root): path for path in root.rglob("*.py")}
    return {name: imports_of(path, paths, root.name) for name, path in paths.items()}


def unit_of(module):
    """The folder or the single file at the top of the package that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def upward_imports(graph, layers):
    level = {unit: number for number, layer in enumerate(layers) for unit in layer}
    return [
        f"{module} imports {imported}"
        for module, found in sorted(graph.items())
        for imported in sorted(found)
        if unit_of(module) != unit_of(imported)
        and level[unit_of(imported)] >= level[unit_of(module)]
    ]


def test_a_lower_layer_imports_no_higher_one():
    graph = import_graph(PACKAGE)
    assert {unit_of(module) for module in graph} == set().union(*LAYERS)
    assert upward_imports(graph, LAYERS) == []


def test_no_import_goes_in_a_circle():
    list(TopologicalSorter(import_graph(PACKAGE)).static_order())


def test_upward_imports_and_circles_are_found(tmp_path):
    root = tmp_path / "house"
    (root / "cellar").mkdir(parents=True)
    (root / "cellar" / "boiler.py").write_text("def heat():\n    from house.roof import chimney\n")
    (root / "roof.py").write_text("from house.cellar import boiler\n")
    (root / "__init__.py").write_text("")
    graph = import_graph(root)
    layers = [{"cellar"}, {"roof"}, {"house"}]
    assert upward_imports(graph, layers) == ["house.cellar.boiler imports house.roof"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())

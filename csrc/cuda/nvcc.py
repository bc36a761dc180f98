"""Compile csrc/cuda with nvcc: objects for setup.py, cubins for the audit of benchmarks."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = [Path(__file__).with_name(f"{name}.cu") for name in ("divergence", "epilogue", "sparse")]
# Compute capabilities with machine code. Other GPUs compile the PTX of the first one at run time.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
REMEDY = (
    "install the CUDA toolkit, 12.8 or newer, or the packages nvidia-cuda-nvcc, nvidia-cuda-crt, "
    "nvidia-nvvm, nvidia-cuda-runtime and nvidia-cuda-cccl of one release, or set CUDA_HOME"
)
_FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-Wall,-Wextra,-fPIC"]


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None if there is none.

    CUDA_HOME or CUDA_PATH decide if set. Else nvcc is looked for in PATH, in /usr/local/cuda and in
    the package nvidia-cuda-nvcc.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    others = ["/usr/local/cuda/bin", *_package_folders()]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(others))


def architectures() -> tuple[int, ...]:
    """Return the compute capabilities of OPD_CUDA_ARCHITECTURES, such as "80 90", or all."""
    value = os.environ.get("OPD_CUDA_ARCHITECTURES")
    if value is None:
        return ARCHITECTURES
    numbers = value.replace(",", " ").split()
    if not numbers or not all(n.isdecimal() and int(n) >= 80 for n in numbers):
        raise ValueError(
            "OPD_CUDA_ARCHITECTURES: expected compute capabilities from 80 on, such as '80 90', "
            f"got {value!r}"
        )
    return tuple(sorted({int(n) for n in numbers}))


def library_folders(nvcc: str) -> list[Path]:
    """Return the folders of the toolkit's libraries.

    nvcc prints the folder of its toolkit; its own path may be that of a wrapper or a link.
    """
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    if root is None:
        raise RuntimeError(f"{' '.join(command)} prints no line '#$ TOP=': {output[:1000]}")
    top = Path(root[1].strip())
    folders = [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def compile_objects(nvcc: str, folder: Path) -> list[Path]:
    """Compile object files with machine code for architectures() and PTX for the first of them."""
    targets = architectures()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    codes.append(f"-gencode=arch=compute_{targets[0]},code=compute_{targets[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        command = [nvcc, *_FLAGS, *_host(), *codes, "--threads", "0", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(objects[-1])])
        if done.returncode != 0:
            raise RuntimeError(
                f"nvcc failed: {' '.join(command)}\nIf it does not support the host's compiler, "
                "set CXX to one that it supports, or OPD_BUILD=cpu to leave out the CUDA backend"
            )
    return objects


def compile_cubin(nvcc: str, source: Path, architecture: int, output: Path) -> str:
    """Compile machine code for one architecture; return the output of nvcc and ptxas."""
    command = [
        nvcc,
        *_FLAGS,
        *_host(),
        "-Xptxas",
        "-v",
        f"-arch=sm_{architecture}",
        "-cubin",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _host() -> list[str]:
    """Return nvcc's option for the host compiler of CXX, which setuptools uses too."""
    compiler = os.environ.get("CXX")
    return ["-ccbin", compiler] if compiler else []


def _package_folders() -> list[str]:
    package = importlib.util.find_spec("nvidia")
    locations = package.submodule_search_locations if package is not None else None
    return [str(b) for path in locations or () for b in sorted(Path(path).glob("cu*/bin"))[::-1]]

"""How csrc/cuda is compiled: for setup.py, which links it, and for the audit, which reads it."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = [Path(__file__).with_name(f"{name}.cu") for name in ("divergence", "epilogue", "sparse")]
# Capabilities with machine code of their own. The others compile the PTX of the first at run time.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
REMEDY = (
    "install the CUDA toolkit, 12.8 or newer, or the packages nvidia-cuda-nvcc, nvidia-cuda-crt, "
    "nvidia-nvvm, nvidia-cuda-runtime and nvidia-cuda-cccl of one release, or set CUDA_HOME"
)
_FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-Wall,-Wextra,-fPIC"]


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME or CUDA_PATH where that is set, else of PATH, of the toolkit in its
    usual place, or of the package nvidia-cuda-nvcc; None without any.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    others = ["/usr/local/cuda/bin", *_package_folders()]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(others))


def architectures() -> tuple[int, ...]:
    """OPD_CUDA_ARCHITECTURES, such as "90" or "80 90", where only some GPUs are meant; else all."""
    wanted = os.environ.get("OPD_CUDA_ARCHITECTURES")
    if wanted is None:
        return ARCHITECTURES
    numbers = wanted.replace(",", " ").split()
    if not numbers or not all(n.isdecimal() and int(n) >= 80 for n in numbers):
        raise ValueError(
            "OPD_CUDA_ARCHITECTURES: expected compute capabilities from 80 on, such as '80 90', "
            f"got {wanted!r}"
        )
    return tuple(sorted({int(n) for n in numbers}))


def library_folders(nvcc: str) -> list[Path]:
    """Where the toolkit has its libraries. The compiler is asked: it may be a wrapper or a link."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if root is None:
        raise RuntimeError(f"{' '.join(command)} does not name its folder: {said[:1000]}")
    top = Path(root[1].strip())
    folders = [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def compile_objects(nvcc: str, folder: Path) -> list[Path]:
    """Object files with code for every architecture that is wanted, and PTX."""
    wanted = architectures()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    codes.append(f"-gencode=arch=compute_{wanted[0]},code=compute_{wanted[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        command = [nvcc, *_FLAGS, *_host(), *codes, "--threads", "0", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(objects[-1])])
        if done.returncode != 0:
            raise RuntimeError(
                f"nvcc failed: {' '.join(command)}\nIf it does not know the host's compiler, set "
                "CXX to one that it does; OPD_BUILD=cpu leaves the CUDA backend out"
            )
    return objects


def compile_cubin(nvcc: str, source: Path, architecture: int, output: Path) -> str:
    """Machine code for one architecture; returns what the compilers said, ptxas' figures too."""
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
    """The C++ compiler that setuptools takes too, where one is named."""
    compiler = os.environ.get("CXX")
    return ["-ccbin", compiler] if compiler else []


def _package_folders() -> list[str]:
    package = importlib.util.find_spec("nvidia")
    locations = package.submodule_search_locations if package is not None else None
    return [str(b) for path in locations or () for b in sorted(Path(path).glob("cu*/bin"))[::-1]]

"""How csrc/cuda is compiled: for setup.py, which links it, and for the audit, which reads it."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("divergence.cu", "epilogue.cu", "sparse.cu")]
# Capabilities with machine code in the package; newer ones compile the PTX of the last.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-Wall,-Wextra,-fPIC"]


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, of PATH, or of the package nvidia-cuda-nvcc; None without any."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    package = importlib.util.find_spec("nvidia")
    for location in package.submodule_search_locations or () if package else ():
        folders += [str(path) for path in sorted(Path(location).glob("cu*/bin"), reverse=True)]
    if home is None and (found := shutil.which("nvcc")):
        return found
    return shutil.which("nvcc", path=os.pathsep.join(folders)) if folders else None


def library_folders(nvcc: str) -> list[Path]:
    """Where the toolkit has its libraries. The compiler is asked: it may be a wrapper or a link."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if root is None:
        raise RuntimeError(f"{' '.join(command)} does not name its folder: {said[:1000]}")
    folders = (Path(root[1].strip()) / name for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
    return [folder.resolve() for folder in folders if folder.is_dir()]


def compile_sources(nvcc: str, folder: Path) -> list[Path]:
    """Object files with code for every architecture; raises CalledProcessError."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        command = [nvcc, *FLAGS, *codes, "--threads", "0", "-c", str(source)]
        subprocess.run([*command, "-o", str(objects[-1])], check=True)
    return objects


def compile_cubin(nvcc: str, source: Path, architecture: int, output: Path) -> str:
    """Machine code for one architecture; returns what the compilers said."""
    command = [nvcc, *FLAGS, f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(output)]
    return subprocess.run(command, check=True, stderr=subprocess.STDOUT, stdout=-1, text=True).stdout

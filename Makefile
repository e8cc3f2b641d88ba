# make        environment and C++ extension      make test   `make check` and the tests, with the packages they need
#                                                make check  format, lint and types; `make format` applies the first
#                                                make smoke  check in seconds that the install works
# make demo   pictures in build/demo             make tiny   train the embedded model again
# make reference  docs/reference.md, from signatures and docstrings
# make bench  kernels and engine on the CPU      make gpu    GPU tests and benchmarks, on a machine with a GPU
PYTHON ?= python3
VENV ?= .venv
# for `make gpu`: a Python with torch and triton; nothing is installed into it
GPU_PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# pytest processes, one thread each
JOBS ?= 2
# extra arguments for pip, such as an index with CPU-only builds of torch
PIP_FLAGS ?=

BIN := $(VENV)/bin
# stamps: the packages to run it, those for tests and benchmarks in the same environment, and the C++ extension
INSTALLED := $(VENV)/installed.stamp
DEV := $(VENV)/dev.stamp
EXTENSION := $(VENV)/extension.stamp
LOG := $(VENV)/setup.log
OLD_CLIENT := $(VENV)/openai-1
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_FLAGS)
# bytecode is kept even where the environment says not to: both runs and hundreds of processes need the same
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
# $(call logged,commands): sends their output to the log, and shows its end if they fail
logged = mkdir -p $(dir $(LOG)); { $(1); } >>$(LOG) 2>&1 || { tail -n 15 $(LOG); echo "that failed; all of it is in $(LOG)"; exit 1; }

FAST := not slow and not gpu and not soak
# CPU level for test-cpu: avx2, default, or the first one below this machine's (docs/testing.md)
LEVEL ?= lesser
AT_LEVEL = env `$(BIN)/python tests/cpu_levels.py $(LEVEL)`

.PHONY: all venv dev extension demo test test-cpu test-slow test-ray soak mutants smoke check format reference tiny bench gpu gpu-wheels clean

all: venv

venv: $(INSTALLED) $(EXTENSION)

dev: venv $(DEV)

extension: $(EXTENSION)

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stylefast needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version 2>&1`;" \
	       "name another one: make PYTHON=python3.12"; exit 1; }
	@echo "installing stylefast and what it runs on into $(VENV); the first time this takes minutes ($(LOG))"
	@$(call logged,test -x $(BIN)/python || $(PYTHON) -m venv $(VENV))
	@$(call logged,$(PIP) setuptools wheel && STYLEFAST_EXTENSION=0 $(PIP) --no-build-isolation -e .)
	@touch $@

$(DEV): $(INSTALLED)
	@echo "adding what the tests need to $(VENV) ($(LOG))"
	@$(call logged,STYLEFAST_EXTENSION=0 $(PIP) --no-build-isolation -e '.[dev]')
	@# the tests only need its server binary; --no-deps avoids its old numpy pin
	@$(call logged,test "`uname -sm`" != "Linux x86_64" || $(PIP) --no-deps nvidia-pytriton)
	@# the client library of before, beside today's; without constraints, which name today's
	@$(call logged,test -d $(OLD_CLIENT) || $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) \
	  --no-deps --target $(OLD_CLIENT) openai==1.109.1 distro==1.9.0)
	@touch $@

$(EXTENSION): $(INSTALLED) $(wildcard csrc/*)
	@echo "building the C++ extension ($(LOG))"
	@$(call logged,$(BIN)/python setup.py -q build_ext --inplace)
	@ls stylefast/_C*.so >/dev/null 2>&1 || echo "it could not be built ($(LOG) says why); stylefast runs without it, slower"
	@touch $@

demo: venv
	@echo "making pictures with the embedded model"
	@$(BIN)/stylefast demo --out build/demo >/dev/null

# all fast tests on this CPU, then those that depend on numerics as on a lesser CPU
test: check
	$(PYTEST) -m "$(FAST)" --durations=30
	$(AT_LEVEL) $(PYTEST) -m "numerics and $(FAST)"

# all fast tests as on a lesser CPU: make test-cpu LEVEL=default
test-cpu: dev
	$(AT_LEVEL) $(PYTEST) -m "$(FAST)"

# one process, since importing torch and diffusers takes most of the time; pytest fails if it finds no test
smoke: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/smoke

test-slow: dev
	$(PYTEST) -m "slow and not gpu"

# the service on a local Ray, which is installed for it
test-ray: dev
	@$(call logged,STYLEFAST_EXTENSION=0 $(PIP) --no-build-isolation -e '.[ray]')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations/test_ray_serve.py

# what takes long on purpose: half an hour, on an idle machine
soak: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m soak

# mistakes that the tests must find (docs/testing.md)
mutants: dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

CPP := $(wildcard csrc/*.cpp csrc/*.h tests/csrc/*.cpp)
check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python tests/type_check.py

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

reference: venv
	$(BIN)/python docs/make_reference.py

tiny: dev
	$(BIN)/python -m benchmarks tiny_model

# writes benchmarks/results/kernels-cpu.json and runtime-cpu.json; takes half an hour; run it on an idle machine
bench: dev
	$(BIN)/python -m benchmarks kernels --device cpu
	$(BIN)/python -m benchmarks runtime --device cpu

# at most nine minutes, no network, nothing installed; results also go to the folder $$OUT if that is set.
# PARTS="tests", "kernels", "runtime" or "exports" spends all the time on one part; "exports" runs only if named
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(PARTS)

# download the pure Python packages of `make gpu` to build/gpu-wheels, for a GPU machine without a network
gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_wheels

# keep .venv, because it is slow to rebuild; delete it by hand if needed
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache stylefast/_C*.so
	rm -f $(EXTENSION)
	find stylefast kernels export tests -name __pycache__ -type d -prune -exec rm -rf {} +

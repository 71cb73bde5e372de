# Needs Python 3.10 to 3.13 and make; the first target that runs sets up .venv.
#
#   make sweep              the demo sweep: ends with its front          (SWEEP_FLAGS="--help" for its flags)
#   make test               the tests but for those of make soak         (TEST_FLAGS="-k attack" for a part)
#   make lint               style, types, imports
#   make rehearse           a sweep on an autoscaling cluster of processes, with a killed node and a killed driver
#   make soak               ends a sweep at 22 moments and runs it again, and other long tests; some 50 minutes
#   make bench              all benchmarks of speed (benchmarks/README.md); some two hours, if idle
#   make pretrain           makes the bundled model anew, or goes on with it; 91 minutes on two busy cores, needs npm
#   make pretrain-people    makes its biased twin and an unbiased control anew; 41 and 12 minutes on two busy cores, needs npm
#   make PYTHON=python3.12  another Python (make clean first); PIP_FLAGS=... goes to pip install

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
SWEEP_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=

# Trials run side by side; more threads than one in each process only get in each other's way.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

# What an activated environment or the caller's shell sets must not leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: sweep test soak lint rehearse bench pretrain pretrain-people clean
.DELETE_ON_ERROR:

sweep: $(VENV)/installed
	$(BIN)/python sweeps/typo_sweep.py $(SWEEP_FLAGS)

# Two groups of tests at a time (tests/conftest.py says which), but for what is marked `alone`.
test: $(VENV)/installed-dev $(VENV)/browser
ifeq ($(strip $(TEST_FLAGS)),)
	$(BIN)/python -m pytest --numprocesses=2 --no-loadscope-reorder --dist=loadfile -m "not alone and not soak"
	$(BIN)/python -m pytest -m "alone and not soak"
else
	$(BIN)/python -m pytest $(TEST_FLAGS)
endif

soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m soak $(TEST_FLAGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

rehearse: $(VENV)/installed-dev
	@mkdir -p build
	REHEARSAL=build/rehearsal.png $(BIN)/python -m pytest tests/integration/test_rehearsal.py --capture=no --quiet
	@echo "the timeline is in build/rehearsal.png"

pretrain: $(VENV)/installed-pretrain
	$(BIN)/python -m clippo.demo.pretraining

pretrain-people: $(VENV)/installed-pretrain
	$(BIN)/python -m clippo.demo.pretraining.people
	$(BIN)/python -m clippo.demo.pretraining.people --control

# Some two hours on an idle machine of two cores.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.step $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.step --pairs 64 $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.step --compile $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.loop $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.workers $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.growth $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.store $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.sweep $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.report

# Keeps results/ and build/, where hours of pretraining may be.
clean:
	rm -rf $(VENV) dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# --- set-up: once, and again when pyproject.toml changes ---------------------------------------------------

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --editable

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or say make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.10 to 3.13; say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv)"; exit 2; }

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "installing clippo into $(VENV): once, some minutes (torch and ray are large)"
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo "installing clippo[$*] into $(VENV): once, some minutes (torch and ray are large)"
	$(PIP_INSTALL) '.[$*]'
	@touch $@ $(VENV)/installed

# The report is tested in Chromium or Chrome. Root on Debian gets it; elsewhere those tests are skipped without.
$(VENV)/browser: | $(BIN)/python
	@for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do \
		command -v $$name > $@ && exit 0; \
	done; \
	if test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		echo "installing chromium-headless-shell for the tests of the report"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell > /dev/null; \
	fi; \
	command -v chromium-headless-shell > $@ || echo "no Chromium: the report's tests in a browser are skipped"

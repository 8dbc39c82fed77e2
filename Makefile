# make ipi: set up, then Imitation -> Preference -> Interaction.   make test: set up, then the tests.
# Another Python: make setup PYTHON=/path/to/python3.11.   Flags of the recipe: make ipi ARGS="--output_dir outputs/mine --seed 1"

BIN := .venv/bin
READY := .venv/.ready
CONFIG ?= recipes/configs/ipi_stackcube_tiny.yaml
ARGS ?=
JOBS ?= 2
PYTHON ?=
export PYTHON

# Every value that `accelerate launch` would otherwise announce as a default of its own. The trainer gets a thread per core and
# the simulators' workers one each: they take turns, and waiting threads sleep instead of spinning.
LAUNCH := OMP_WAIT_POLICY=passive $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help setup vulkan ipi test test-slow doctor lint clean

help:
	@echo "make ipi      set up and run the three phases (ARGS=... are flags of recipes/ipi.py)"
	@echo "make test     set up and run the tests          make test-slow   those that take minutes"
	@echo "make doctor   what works here, and what repairs the rest"
	@echo "make setup    set up only                       make lint        ruff      make clean"

# the driver first: where it takes an administrator, say so before anything is downloaded
setup: vulkan $(READY)

vulkan:
	@bash .ci/vulkan.sh

$(READY): requirements.lock setup.py .ci/setup.sh | vulkan
	@bash .ci/setup.sh
	@touch $@

ipi: setup
	$(LAUNCH) recipes/ipi.py --config $(CONFIG) $(ARGS)

# whole files to each process: their fixtures are simulators
test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

doctor:
	@test -x $(BIN)/python || { echo "doctor: there is no virtual environment yet. Run: make setup"; exit 1; }
	@$(BIN)/python -m trl_stare.envs.doctor

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find trl_stare recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

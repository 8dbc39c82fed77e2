# make ipi: set up, then Imitation -> Preference -> Interaction.   make test: set up, then the tests.
# Another Python: make setup PYTHON=/path/to/python3.11.   Flags of the recipe: make ipi ARGS="--output_dir outputs/mine --seed 1"

BIN := .venv/bin
READY := .venv/.ready
CONFIG ?= recipes/configs/ipi_stackcube_tiny.yaml
ARGS ?=
JOBS ?= 2
PYTHON ?=
export PYTHON
# SmolVLA and pi0.5 are LeRobot's, whose pins exclude ours (docs/flow.md): an environment beside ours
LEROBOT := .lerobot-env/bin/python
LEROBOT_PYTHON ?= python3.12

# Every value that `accelerate launch` would otherwise announce as a default of its own. The trainer gets a thread per core and
# the simulators' workers one each: they take turns, and waiting threads sleep instead of spinning. One GPU, unless you choose others:
# of several, transformers would take all for the one process (`nn.DataParallel`).
LAUNCH := OMP_WAIT_POLICY=passive CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/accelerate launch \
	--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help setup vulkan ipi test test-slow test-lerobot doctor lint clean

help:
	@echo "make ipi      set up and run the three phases (ARGS=... are flags of recipes/ipi.py)"
	@echo "make test     set up and run the tests          make test-slow   those that take minutes"
	@echo "make test-lerobot   SmolVLA and pi0.5 in an environment of their own (Python 3.12, 5.6 GB)"
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

# whole files to each process: their fixtures are simulators; in their order, as the files with the fewest tests, which xdist would
# leave for the end, are the longest
test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

.lerobot-env/.ready: setup.py
	$(LEROBOT_PYTHON) -m venv .lerobot-env
	$(LEROBOT) -m pip install 'lerobot[smolvla,pi,dataset]==0.6.1' 'trl==1.16.0' 'mani_skill==3.0.1' 'sapien==3.0.3' fast-simplification peft \
		pytest pytest-timeout
	$(LEROBOT) -m pip install --no-deps -e .
	@touch $@

test-lerobot: vulkan .lerobot-env/.ready
	$(LEROBOT) -m pytest tests/policies/test_lerobot.py tests/policies/test_lerobot_trains.py \
		tests/recipes/test_sft.py::test_a_smolvla_of_lerobot_is_trained $(ARGS)

doctor:
	@test -x $(BIN)/python || { echo "doctor: there is no virtual environment yet. Run: make setup"; exit 1; }
	@$(BIN)/python -m trl_stare.envs.doctor

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .lerobot-env build dist *.egg-info .pytest_cache .ruff_cache
	find trl_stare recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

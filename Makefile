# Two commands on a machine with Python >= 3.10, a C++ compiler and make:
#   make demo   trains an SN-GAN on the digits that come with scikit-learn, and says how many a classifier recognizes
#   make test   runs the tests that take a few minutes together on two cores; make test-all runs all of them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := runs/demo
SECONDS := 300
# Processes that the tests run in. A process starts with a run of tests and takes over from others at the end.
WORKERS := 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# A module is compiled when it is first imported, not again in each of the processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE
# A short run: labels, larger learning rates than those of the recipe, which fall to 0, and a shorter average.
STEPS := 1400

.PHONY: demo test test-all peers bench gpu gpu-model aot sanitize fuzz soak matrix aarch64 lint docs clean

demo: $(VENV)/.installed
	$(BIN)/lipgan train --recipe sngan --conditioning auxiliary --data digits --size 12 --latent-dim 32 \
		--steps $(STEPS) --generator-lr 1e-3 --critic-lr 4e-3 --lr-decay linear --ema-decay 0.99 \
		--evaluate-every 200 --out $(OUT) --overwrite
	@echo "Look at $(OUT)/samples.png (a column for each digit) and $(OUT)/curves.png (losses, evaluations, sigma)."

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

# The packages whose metrics and classes lipgan.compat stands in for, the trainers of docs/examples, and pyarrow, which
# tables of images need, in a folder of their own, and the tests against them. Without what they depend on: torchvision
# would bring another torch along, and the rest is here.
PEERS := build/peers
peers: $(VENV)/.installed
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --constraint constraints.txt --target $(PEERS) \
		torchmetrics lightning-utilities prdc POT pytorch-fid torch-fidelity clean-fid \
		lightning accelerate huggingface-hub psutil pyyaml pyarrow
	OMP_NUM_THREADS=1 LIPGAN_TEST_PEERS=required PYTHONPATH=$(PEERS) $(PYTEST) tests/compat \
		tests/data/test_image_shards.py

bench: $(VENV)/.installed
	$(BIN)/lipgan bench all

# The C++ kernels under sanitizers, and random calls of the ops against the reference. `make fuzz SECONDS=3600 SEED=1`
sanitize: $(VENV)/.installed
	PYTHON=$(BIN)/python scripts/sanitize.sh $(SANITIZE)

fuzz: $(VENV)/.installed
	$(BIN)/python tests/harness/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# For the night: a long run of every op, in which memory must not grow.
soak: $(VENV)/.installed
	$(BIN)/python scripts/soak.py

# On a machine with a GPU: what only it can tell, in 9 minutes, without a network. scripts/gpu_acceptance.py says more.
# It takes the Python that has torch and Triton, and leaves it as it is: `make gpu PYTHON=/path/to/python`
gpu:
	$(PYTHON) scripts/gpu_acceptance.py --out build/gpu

# The Triton kernels for every target, within their limits of registers, spills and shared memory.
aot: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python -m lipgan.kernels.aot

# docs/gpu-model.md: what the kernels ask of a GPU, computed from their launches.
gpu-model: $(VENV)/.installed
	$(BIN)/python scripts/gpu_model.py

# What `make test` runs, on other Pythons and releases of torch. `make matrix MATRIX="3.10:oldest 3.13:newest"`
matrix:
	PYTHON=$(PYTHON) WORKERS=$(WORKERS) scripts/matrix.sh $(MATRIX)

# The C++ kernels for ARM, by a cross compiler and an emulator. `make aarch64 AARCH64=--tests` runs the tests of the ops.
aarch64: $(VENV)/.installed
	PYTHON=$(BIN)/python scripts/aarch64.sh $(AARCH64)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. Everything is read again (-E): a page that was read before keeps names that have moved since.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs build/docs
	@echo "Open build/docs/index.html."

# An editable install: the Python sources are used where they lie, the C++ module is built into lipgan/.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lipgan/*.so

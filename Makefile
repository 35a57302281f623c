# Two commands on a machine with Python >= 3.10, a C++ compiler and make:
#   make demo   trains an SN-GAN on the digits that come with scikit-learn, and shows where it wrote the pictures
#   make test   runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := runs/demo
SECONDS := 300
# A short run: larger steps than those of the recipe, and an average over fewer of them.
STEPS := 1400

.PHONY: demo test bench sanitize fuzz soak lint clean

demo: $(VENV)/.installed
	$(BIN)/lipgan train --recipe sngan --data digits --steps $(STEPS) \
		--generator-lr 5e-4 --critic-lr 1e-3 --ema-decay 0.995 --out $(OUT) --overwrite
	@echo "Look at $(OUT)/samples.png (digits) and $(OUT)/curves.png (losses and sigma)."

test: $(VENV)/.installed
	$(BIN)/python -m pytest

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# An editable install: the Python sources are used where they lie, the C++ module is built into lipgan/.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lipgan/*.so

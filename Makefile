# Everything runs in .venv, which is made on the first call and again only when the requirements change.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
# Python compiles what is imported; pip would compile all that lies there, which takes half a minute.
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile $(PIP_ARGS) -c constraints.txt
# Two processes at a time, of one thread each: tests are many small steps, which more threads do not speed up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

define MAKE_VENV
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
endef

.PHONY: help demo test test-all test-portable test-gpu test-examples lint tables clean
help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: .venv/.base  ## make a small data set, train on it, evaluate, and write images with boxes
	$(BIN)/python tools/make_demo_data.py --out data/demo
	$(BIN)/python tools/train.py configs/demo.yaml
	$(BIN)/python tools/evaluate.py runs/demo/best.pt --json runs/demo/evaluation.json
	$(BIN)/python tools/detect.py runs/demo/best.pt 'data/demo/images/val_*.jpg' --out runs/demo/detections
	@echo
	@echo "images with boxes:   runs/demo/detections/"
	@echo "report of the run:   runs/demo/report.html (open it in a browser), runs/demo/report.json (its numbers)"

test: .venv/.dev lint  ## lint and all tests but the slow ones
	$(PYTEST)

test-all: .venv/.all lint  ## lint and every test, the slow ones too
	$(PYTEST) -m "slow or not slow"

test-portable: .venv/.dev  ## what trains or compares numbers, with five seeds and the kernels of older processors
	$(BIN)/python tests/portable.py

test-gpu: .venv/.dev  ## what only a GPU shows (each test says why it is skipped where there is none)
	$(BIN)/python -m pytest -m gpu -s tests/gpu

test-examples: .venv/.dev  ## the examples in Node and in headless Chromium (npm and chromium must be installed)
	npm --prefix examples/node install --no-audit --no-fund
	npm --prefix examples/web ci --no-audit --no-fund
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/examples

lint: .venv/.dev  ## ruff (rules and format), mypy, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy backbones detection tools/*.py --scripts-are-modules
	$(BIN)/lint-imports setup.cfg --no-logo

tables: .venv/.base  ## update the cost tables in docs/costs.md
	$(BIN)/python tools/dev/cost_tables.py

clean:  ## remove .venv and caches (runs/ and data/ stay)
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info

# One call of pip for each, as each call looks at all requirements: make test alone does not go by way of .base.
.venv/.base: setup.cfg constraints.txt
	$(MAKE_VENV)
	$(PIP) -e .
	@touch $@

.venv/.dev: setup.cfg constraints.txt
	$(MAKE_VENV)
	$(PIP) -e '.[dev]'
	@touch .venv/.base $@

# Besides, what slow tests alone need (nncf brings scikit-learn).
.venv/.all: .venv/.dev
	$(PIP) -e '.[dev,quantize]'
	@touch $@

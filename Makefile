# make demo and make test each do all of their own set-up; both are quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.set-up
MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
KERNELS := $(wildcard stage/stagemesh/stage/native/*.[ch])
PROTOS := $(wildcard protos/stagemesh/v1/*.proto)
STUBS := $(wildcard protos/stagemesh/v1/stage_pb2.py)

.DEFAULT_GOAL := help
.PHONY: help setup model demo test compose-test lint format bench device-kit clean always

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## the virtual environment in .venv, with everything in it

# The stamp is written last: an interrupted set-up is done again.
$(STAMP): pyproject.toml setup.py constraints-dev.txt $(KERNELS) $(PROTOS) $(if $(STUBS),,always)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"stagemesh needs Python 3.11 or 3.12; found " + sys.version.split()[0] + " (make PYTHON=... picks another)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[dev,demo]' --constraint constraints-dev.txt
	@touch $@

model: $(STAMP) ## the demo model in .cache/models, its checksum checked
	@$(BIN)/python tools/fetch_demo_model.py $(MODEL)

demo: model ## three stages, one with TP=2, answer a question
	@$(BIN)/python examples/demo.py $(MODEL)

test: model ## every test that needs no GPU
	$(BIN)/python -m pytest -m 'not gpu and not compose'

compose-test: model ## the mesh of compose/ in a Docker engine; installs what it needs on Debian
	$(BIN)/python -m pytest -m compose -x -v -s -o faulthandler_timeout=1200 tests/compose

lint: $(STAMP) ## ruff, mypy and buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: model ## benchmarks/cpu.py against transformers
	$(BIN)/python benchmarks/cpu.py --json

device-kit: $(STAMP) ## wheels in build/device-kit for a GPU machine without a package registry
	@$(BIN)/python tools/device_kit.py

clean: ## everything that was made here but the model
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f protos/stagemesh/v1/*_pb2.py protos/stagemesh/v1/*_pb2.pyi protos/stagemesh/v1/*_pb2_grpc.py
	rm -f stage/stagemesh/stage/native/*.so
	find client protos router stage tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +

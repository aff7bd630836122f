# Every target sets up what it needs; nothing is set up twice unless pyproject.toml or constraints.txt changed.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Another package index for torch alone, such as the one with its CPU builds.
TORCH_INDEX_URL ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PACKAGES := $(foreach room,protos export server client cli,-p carousel_$(room))

.PHONY: help run serve test haproxy lint format systems bench bench-quick bench-peers soak figures protos clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-11s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): a few minutes the first time"
	@$(PIP) pip
	@# torch first: its index may be another, and what follows must take the build that is there
	@$(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[all]' --group dev
	@touch $@

run: $(READY) ## The main job, end to end on a real model: export, prove, serve, stream; ends by itself
	@$(BIN)/python -m examples.pinyin.run

serve: $(READY) ## Keep a server up on the example's model; prints the line that streams to it
	@$(BIN)/python -m examples.pinyin.run --serve

test: $(READY) haproxy lint ## Lint, then every test, on real servers
	@$(BIN)/python -m pytest -q --numprocesses 2 --dist loadgroup

haproxy:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin"; command -v haproxy > /dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && echo "installing haproxy" && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends haproxy > /dev/null; } \
		|| echo "there is no haproxy, which tests/durability/test_rolling.py needs: apt-get install haproxy" >&2

lint: $(READY) ## Style, strict types, import boundaries, stale generated code
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo "run make format"; exit 1; }
	@$(BIN)/mypy $(PACKAGES)
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python protos/generate.py --check
	@$(BIN)/python -m tests.support.systems --check > /dev/null
	@$(BIN)/python -m bench.figures --check

format: $(READY) ## Put the code in its form
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

systems: $(READY) ## Write README's table of supported models from the tests that prove it
	@$(BIN)/python -m tests.support.systems > /dev/null

bench: $(READY) ## Carousel, Triton, servers by hand and the raw onnxruntime call side by side; under ten minutes
	@$(BIN)/python -m bench.run

bench-quick: $(READY) ## The same with fewer sessions and one round, in under two minutes; leaves bench/results alone
	@$(BIN)/python -m bench.run --quick

bench-peers: $(READY) ## Ray Serve, MLServer, TorchServe, BentoML and LitServe, each in an environment of its own
	@$(BIN)/python -m bench.others

soak: $(READY) ## 400 kills, a million wrong requests, memory over 30 minutes; SOAK="--help" says what can be shorter
	@nice -n 10 $(BIN)/python -m soak.run $(SOAK)

figures: $(READY) ## Write the documents' figures from bench/results
	@$(BIN)/python -m bench.figures

protos: $(READY) ## Generate Python from the .proto files
	@$(BIN)/python protos/generate.py

clean: ## Remove the environment, caches and exported models
	rm -rf $(VENV) .peers models .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

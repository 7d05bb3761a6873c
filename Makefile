# Everything here makes what it needs: on a bare machine with Python, `make demo` and `make test` are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
UV := uv==0.13.8

.PHONY: setup demo test lint types contracts unit browser slow lock clean

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(UV) || echo "uv is not to be had; pip will do, more slowly"
	if test -x $(BIN)/uv; then \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes --requirement requirements.lock && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .; \
	else \
	  $(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock && \
	  $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
	fi
	touch $@

demo: setup
	$(BIN)/sightline demo --out demo

test: lint types contracts unit

lint: setup
	$(BIN)/ruff check src tests benchmarks proofs
	$(BIN)/ruff format --check src tests benchmarks proofs
	$(BIN)/codespell src tests proofs docs README.md CONTRIBUTING.md CHANGELOG.md

types: setup
	$(BIN)/ty check src

contracts: setup
	$(BIN)/lint-imports

unit: setup browser
	$(BIN)/python -m pytest -n 2

# The page is tested in a real browser. Where there is none, root gets Debian's; others are told how to get one.
browser:
	@if command -v chromium || command -v chromium-browser || test -x "$$SIGHTLINE_CHROMIUM"; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else \
	  echo "no chromium: install it, run .venv/bin/playwright install chromium, or set SIGHTLINE_CHROMIUM to a browser"; \
	fi

slow: setup
	$(BIN)/python -m pytest -m slow

# Pins every dependency with its hashes; registry addresses stay out of it.
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-header --no-annotate \
	  --upgrade --output-file requirements.lock

clean:
	rm -rf .venv demo

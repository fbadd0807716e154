#!/bin/sh
# Runs a command such as `pip install .` so that pip builds llama-cpp-python as inferpool wants it:
# compiled with llama-cpp.h, and with rust/blas for prompts and for texts to embed.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cargo build --quiet --release --locked --manifest-path "$root/Cargo.toml" --package inferpool-blas \
	--target-dir "$root/target/blas"

# What makes floats of weights is compiled for any CPU otherwise, unlike the rest.
export CFLAGS="${CFLAGS:-} -march=native"
export CXXFLAGS="${CXXFLAGS:-} -march=native -include \"$root/requirements/llama-cpp.h\""
# Without OpenMP ggml's BLAS backend starts a thread for each weight.
export CMAKE_ARGS="${CMAKE_ARGS:-} -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS \
'-DBLAS_INCLUDE_DIRS=$root/rust/blas/include' \
'-DBLAS_LIBRARIES=$root/target/blas/release/libinferpool_blas.a;gomp;-Wl,--exclude-libs,ALL' \
'-DBLAS_LINKER_FLAGS=-fopenmp;-DGGML_USE_OPENMP'"

# pip goes by the source alone, and would take a wheel from its cache that was built otherwise.
recipe=$(cd "$root" && cat Cargo.lock requirements/llama-cpp.* rust/blas/include/* rust/blas/src/* | sha256sum)
cache="${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}"
export PIP_CACHE_DIR="$cache/llama-cpp-$(echo "$recipe" | cut -c1-16)"

exec "$@"

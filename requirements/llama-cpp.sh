#!/bin/sh
# Runs a command such as `pip install .` so that pip builds llama-cpp-python as inferpool wants it:
# compiled with llama-cpp.h, and with the products of matrices of rust/matmul.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env -u CARGO_BUILD_TARGET cargo build --quiet --release --locked --package inferpool-matmul \
	--manifest-path "$root/Cargo.toml" --target-dir "$root/target/matmul"

# pip goes by the source alone, and would take a wheel from its cache that was built otherwise.
recipe=$(cd "$root" && echo "${CFLAGS:-};${CXXFLAGS:-};${CMAKE_ARGS:-};$(rustc --version)" |
	cat - requirements/llama-cpp.* Cargo.* rust/matmul/Cargo.toml rust/matmul/src/[!t]* |
	sha256sum | cut -c1-16)
export PIP_CACHE_DIR="${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}/llama-cpp-$recipe"

export CFLAGS="${CFLAGS:-} -include \"$root/requirements/llama-cpp.h\""
export CXXFLAGS="${CXXFLAGS:-} -include \"$root/requirements/llama-cpp.h\""
export CMAKE_ARGS="${CMAKE_ARGS:-} '-DCMAKE_CXX_STANDARD_LIBRARIES=\
\"$root/target/matmul/release/libinferpool_matmul.a\" -Wl,--exclude-libs,libinferpool_matmul.a'"

exec "$@"
